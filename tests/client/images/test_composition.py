"""Three runs, two servers, real image files: the ledger recognises patients whatever becomes of the files."""

import dp_accounting
import pytest
from dp_accounting.pld import PLDAccountant
from PIL import Image

from client.ledger.ledger import Ledger
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent

DELTA = 1e-4
RUNS = {
    "a": ("server-1", PrivacyEvent(sampling_rate=0.5, noise_multiplier=6.0, steps=4)),
    "b": ("server-2", PrivacyEvent(sampling_rate=0.2, noise_multiplier=2.0, steps=10)),
    "c": ("server-1", PrivacyEvent(sampling_rate=1, noise_multiplier=20.0, steps=3)),
}


@pytest.fixture
def ledger(tmp_path):
    return Ledger.open(tmp_path / "ledger")


def charge(ledger, run, images):
    server, event = RUNS[run]
    return ledger.charge(
        RoundKey(run_id=run, attempt=1, round_number=1, model_hash="m"),
        event=event,
        cohort=ledger.cohort(images.train.unit_ids),
        delta=DELTA,
        unit=images.unit,
        recipient=server,
    )


def one_composition(*runs):
    """Directly with dp-accounting, from nothing of ours."""
    accountant = PLDAccountant()
    for run in runs:
        event = RUNS[run][1]
        step = dp_accounting.GaussianDpEvent(event.noise_multiplier)
        if event.sampling_rate < 1:
            step = dp_accounting.PoissonSampledDpEvent(event.sampling_rate, step)
        accountant.compose(dp_accounting.SelfComposedDpEvent(step, event.steps))
    return accountant.get_epsilon(DELTA)


def rows(first, last):
    """Two images each of patients first..last-1."""
    return [
        (f"{patient}-{image}.png", f"P{patient:03}", "ill" if patient % 2 else "normal")
        for patient in range(first, last)
        for image in (1, 2)
    ]


def test_three_runs_against_two_servers_on_overlapping_patients(ledger, manifest, read):
    header = ("image", "patient", "label")
    patients = {"a": (0, 8), "b": (6, 12), "c": (4, 20)}  # 6 and 7 are in all three
    for run, (first, last) in patients.items():
        images = read(manifest(header, rows(first, last)))
        assert images.unit == "patient"
        charge(ledger, run, images)
    spent = Ledger.open(ledger.folder).spent(DELTA)
    assert spent.patients == 20
    assert spent.epsilon == pytest.approx(one_composition("a", "b", "c"), abs=1e-6)


def test_renamed_and_re_encoded_files_are_the_same_patients(ledger, manifest, read, tmp_path):
    header = ("image", "patient", "label")
    first = charge(ledger, "a", read(manifest(header, rows(0, 8))))
    data = tmp_path / "data"
    renamed = []
    for name, patient, label in rows(0, 8):
        with Image.open(data / name) as image:
            image.save(data / f"scan_{name}.bmp")
        (data / name).unlink()
        renamed.append((f"scan_{name}.bmp", patient, label))
    extra = [("more.png", "P003", "ill")]  # a further image of a known patient
    again = charge(ledger, "b", read(manifest(header, renamed[::-1] + extra)))
    assert again.cohort_digest == first.cohort_digest
    assert ledger.spent(DELTA).epsilon == pytest.approx(one_composition("a", "b"), abs=1e-6)


def test_without_patients_the_decoded_picture_is_the_unit(ledger, draw, read, tmp_path):
    for number in range(6):
        draw(tmp_path / "one" / ("ill" if number % 2 else "normal") / f"{number}.png", number)
    first = read(tmp_path / "one")
    assert first.unit == "image"
    charge(ledger, "a", first)
    for number in range(6):
        path = tmp_path / "two" / ("ill" if number % 2 else "normal") / f"export-{100 - number}.tiff"
        draw(path, number, format="TIFF")
    second = read(tmp_path / "two")
    assert charge(ledger, "b", second).cohort_digest == ledger.charges()[0].cohort_digest
    assert ledger.spent(DELTA).epsilon == pytest.approx(one_composition("a", "b"), abs=1e-6)
