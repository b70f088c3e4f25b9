"""Phantoms: same seed same pixels, one anatomy per patient, scanners that differ, a task to be learnt."""

import hashlib
import os
import subprocess
import sys
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest

from client.images.phantoms import LARGEST_IMAGE, SMALLEST_IMAGE, PhantomSet, Scanner, hospital_phantoms

HOSPITALS = (1, 2, 3, 4, 5)


def digest(phantoms: PhantomSet) -> str:
    """Hash of all that a phantom set holds."""
    content = (phantoms.images, phantoms.labels, phantoms.opacity_boxes, "/".join(phantoms.patients).encode())
    return hashlib.sha256(b"".join(bytes(part) for part in content)).hexdigest()


def rank_correlation(a: list[float], b: list[float]) -> float:
    """Spearman's, without ties."""
    ranks = [np.argsort(np.argsort(values)) for values in (a, b)]
    return float(np.corrcoef(*ranks)[0, 1])


@pytest.fixture(scope="module")
def federation() -> list[PhantomSet]:
    return [hospital_phantoms(hospital=h, num_patients=300, image_size=28, seed=0) for h in HOSPITALS]


@pytest.mark.parametrize("image_size", [SMALLEST_IMAGE, 28, 33, 64, 128, 256])
def test_every_size_gives_whole_rows(image_size):
    phantoms = hospital_phantoms(hospital=2, num_patients=14, image_size=image_size, seed=1)
    rows = len(phantoms.patients)
    assert phantoms.images.shape == (rows, image_size, image_size)
    assert phantoms.images.dtype == np.uint8
    assert phantoms.labels.shape == (rows,)
    assert phantoms.labels.dtype == np.int64
    assert phantoms.site == "phantom-hospital-2"
    assert list(dict.fromkeys(phantoms.patients)) == [f"phantom-h2-p{number:04d}" for number in range(14)]
    # Every film has dark air beside the neck, bright tissue in the belly, and is not flat.
    assert phantoms.images[:, : image_size // 10, : image_size // 10].mean() < 40
    assert phantoms.images[:, -image_size // 6 :, image_size // 3 : -image_size // 3].mean() > 100
    assert phantoms.images.reshape(rows, -1).std(axis=1).min() > 20


def test_one_chest_whatever_the_picture_size():
    """A film of 32 px is the one of 128 px made smaller: same patients, poses and opacities."""
    small, large = (hospital_phantoms(hospital=3, num_patients=30, image_size=s, seed=5) for s in (32, 128))
    assert small.patients == large.patients
    shrunk = large.images.reshape(-1, 32, 4, 32, 4).mean(axis=(2, 4))
    correlation = [np.corrcoef(a.ravel(), b.ravel())[0, 1] for a, b in zip(small.images, shrunk, strict=True)]
    assert min(correlation) > 0.97


def test_same_pixels_in_another_process_and_with_other_threads():
    code = (
        "import sys; sys.path[:0] = ['.', 'tests/client']\n"
        "from test_phantoms import digest, hospital_phantoms\n"
        "print(digest(hospital_phantoms(hospital=4, num_patients=20, image_size=96, seed=9)))"
    )
    root = Path(__file__).resolve().parents[2]
    threads = {"OMP_NUM_THREADS": "2", "OPENBLAS_NUM_THREADS": "2", "PYTHONHASHSEED": "7"}
    other = subprocess.run(
        [sys.executable, "-c", code],
        cwd=root,
        env=os.environ | threads,
        capture_output=True,
        text=True,
        check=True,
    )
    here = hospital_phantoms(hospital=4, num_patients=20, image_size=96, seed=9)
    assert other.stdout.strip() == digest(here)


def test_seed_and_hospital_change_the_patients():
    arguments = [(1, 0), (1, 1), (2, 0), (0, 1)]
    sets = [hospital_phantoms(hospital=h, num_patients=8, image_size=28, seed=s) for h, s in arguments]
    assert len({digest(phantoms) for phantoms in sets}) == len(arguments)


def test_global_random_state_is_neither_used_nor_moved():
    np.random.seed(3)
    before = np.random.get_state()[1].copy()
    first = hospital_phantoms(hospital=1, num_patients=5, image_size=28, seed=0)
    assert np.array_equal(np.random.get_state()[1], before)
    np.random.seed(4)
    assert digest(hospital_phantoms(hospital=1, num_patients=5, image_size=28, seed=0)) == digest(first)


def test_images_of_a_patient_are_alike_but_not_equal(federation):
    phantoms = federation[0]
    counts = np.unique(phantoms.patients, return_counts=True)[1]
    assert set(counts.tolist()) == {1, 2, 3, 4}
    pixels = phantoms.images.reshape(len(phantoms.images), -1).astype(float)
    neighbours = [row for row in range(len(pixels) - 1) if phantoms.labels[row] == phantoms.labels[row + 1]]
    gap = {row: float(np.abs(pixels[row] - pixels[row + 1]).mean()) for row in neighbours}
    same = [row for row in neighbours if phantoms.patients[row] == phantoms.patients[row + 1]]
    inside = np.mean([gap[row] for row in same])
    between = np.mean([gap[row] for row in set(neighbours) - set(same)])
    assert min(gap.values()) > 0
    assert inside < 0.85 * between


def test_one_label_per_patient_and_the_asked_prevalence(federation):
    for phantoms in federation:
        labels = dict(zip(phantoms.patients, phantoms.labels.tolist(), strict=True))
        assert all(labels[p] == label for p, label in zip(phantoms.patients, phantoms.labels, strict=True))
        assert sum(labels.values()) == 150
        assert np.array_equal(phantoms.labels > 0, phantoms.opacity_boxes.any(axis=(1, 2)))
    for prevalence, ill in [(0.0, 0), (0.2, 4), (1.0, 20)]:
        few = hospital_phantoms(hospital=0, num_patients=20, image_size=28, seed=2, prevalence=prevalence)
        assert len({p for p, label in zip(few.patients, few.labels, strict=True) if label}) == ill


def test_scanners_of_neighbours_are_no_twins():
    low_high = np.array([astuple(Scanner.of_hospital(h)) for h in range(60)])
    shares = (low_high - low_high.min(0)) / np.ptp(low_high, axis=0)
    for count in (3, 5, 10):
        distances = np.abs(shares[:count, None] - shares[None, :count]).max(axis=-1)
        assert distances[~np.eye(count, dtype=bool)].min() > 0.25
    assert Scanner.of_hospital(3) == Scanner.of_hospital(3)


def test_scanners_show_in_brightness_noise_and_sharpness():
    """Each is measured on the films alone and must follow the scanner's setting over the hospitals."""
    means, noises, edges, scanners = [], [], [], []
    for hospital in HOSPITALS:
        phantoms = hospital_phantoms(hospital=hospital, num_patients=60, image_size=128, seed=0, prevalence=0)
        films = phantoms.images.astype(float)
        scanners.append(phantoms.scanner)
        means.append(films.mean())
        belly = films[:, 108:124, 72:92]  # smooth tissue: what differs from pixel to pixel is noise
        residual = belly[:, 1:, 1:] - belly[:, :-1, 1:] - belly[:, 1:, :-1] + belly[:, :-1, :-1]
        noises.append(residual.std() / (128 + belly.mean()))
        flank = films[:, 92:104].mean(axis=1)  # one profile across the skin, its noise averaged away
        edges.append(np.median(np.diff(flank, axis=1).max(axis=1) / np.ptp(flank, axis=1)))
    assert np.ptp(means) > 10
    assert rank_correlation(noises, [scanner.noise for scanner in scanners]) > 0.85
    assert max(noises) > 1.5 * min(noises)
    assert rank_correlation(edges, [scanner.blur for scanner in scanners]) < -0.85
    assert max(edges) > 1.2 * min(edges)


def test_opacities_are_bright_where_the_boxes_say(federation):
    """At the centres of boxes ill patients are brighter than the hospital's healthy ones; elsewhere not."""
    inside, elsewhere, spread = [], [], []
    for phantoms in federation:
        healthy, deviation = (f(phantoms.images[phantoms.labels == 0], axis=0) for f in (np.mean, np.std))
        rows, slots = np.nonzero(phantoms.opacity_boxes.any(axis=-1))
        left, top, right, bottom = phantoms.opacity_boxes[rows, slots].T
        assert (left < right).all()
        assert (top < bottom).all()
        assert min(left.min(), top.min()) >= 0
        assert max(right.max(), bottom.max()) <= 28
        y, x = (top + bottom) // 2, (left + right) // 2
        inside.append(phantoms.images[rows, y, x] - healthy[y, x])
        spread.append(deviation[y, x])
        elsewhere.append(phantoms.images[rows, 25, 14] - healthy[25, 14])
    assert np.concatenate(inside).mean() > 25
    assert abs(np.concatenate(elsewhere).mean()) < 6
    # A good part of them hides among what healthy chests show at the same pixel.
    hidden = np.concatenate(inside) < 2 * np.concatenate(spread)
    assert 0.15 < hidden.mean() < 0.7


def test_learnable_but_not_by_one_look(federation):
    """Logistic regression on pixels, scored on unseen patients, finds something and leaves room."""
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import roc_auc_score

    pixels = np.concatenate([p.images.reshape(len(p.images), -1) for p in federation]) / 255 - 0.5
    labels = np.concatenate([p.labels for p in federation])
    unseen = np.concatenate([[patient[-4:] >= "0225" for patient in p.patients] for p in federation])
    probe = LogisticRegression(C=0.05, max_iter=500).fit(pixels[~unseen], labels[~unseen])
    assert 0.6 < roc_auc_score(labels[unseen], probe.decision_function(pixels[unseen])) < 0.97
    # No shortcut: the brightness of the whole film says little.
    assert roc_auc_score(labels, pixels.mean(axis=1)) < 0.75


@pytest.mark.parametrize(
    "wrong",
    [
        {"hospital": -1},
        {"seed": -1},
        {"num_patients": 0},
        {"image_size": SMALLEST_IMAGE - 1},
        {"image_size": LARGEST_IMAGE + 1},
        {"prevalence": 1.1},
        {"prevalence": float("nan")},
    ],
)
def test_impossible_arguments_are_refused(wrong):
    with pytest.raises(ValueError, match="got"):
        hospital_phantoms(**{"hospital": 1, "num_patients": 4, "image_size": 28, "seed": 0} | wrong)
