"""The steps on the real samples: Hounsfield windows by hand, masks of films, what must be refused."""

import numpy as np
import pydicom
import pytest
from PIL import Image

from client.images.decode import fit, guarded_pillow
from client.images.formats import open_picture
from client.images.records import WHOLE, SkipReason, Unusable
from common.intensities import Intensities
from common.preparation.foreground import body, foreground, lung_fields
from common.preparation.settings import PreprocessingSection
from common.preprocessing import Preprocessing, eight_bits

LIMIT = 10**8
BRAIN = {"window": (40.0, 80.0)}
FILMS = ("kermany_cxr", "covid_cxr_sites")


def opened(path):
    with guarded_pillow(LIMIT):
        return open_picture(path.read_bytes(), WHOLE, max_pixels=LIMIT)


def fitted(picture, *, size=64, channels=1, **steps):
    steps = PreprocessingSection(**steps)
    return fit(picture, Preprocessing(image_size=size, channels=channels, steps=steps))


def films(shared_data, name, count):
    found = sorted(
        p for p in (shared_data / name).rglob("*") if p.suffix.lower() in (".jpg", ".jpeg", ".png")
    )
    return found[:: len(found) // count][:count]


def greys(path):
    shown = eight_bits(opened(path))
    return np.asarray(Image.fromarray(shown).convert("L")).astype(np.float32) / 255


@pytest.mark.parametrize("name", ["ct_head_series/14.dcm", "dicom_samples/CT_small.dcm"])
def test_a_window_of_a_ct_slice_is_the_formula_on_its_hounsfield_units(shared_data, name):
    path = shared_data / name
    dataset = pydicom.dcmread(path)
    units = dataset.pixel_array * float(dataset.RescaleSlope) + float(dataset.RescaleIntercept)
    expected = ((units - 40) / 80 + 0.5).clip(0, 1).astype(np.float32)
    side = expected.shape[0]
    assert expected.shape == (side, side)
    found = fitted(opened(path), size=side, **BRAIN)
    assert np.abs(found[0] - 255 * expected).max() <= 0.5 + 1e-3


def test_only_what_states_hounsfield_units_takes_such_a_window(shared_data):
    """CT images of the samples, and none of the MR, RT, US, film or screen captures."""
    takes = set()
    for path in sorted((shared_data / "dicom_samples").glob("*.dcm")):
        try:
            picture = opened(path)
        except Unusable:
            continue
        if isinstance(picture, Intensities) and picture.is_hounsfield:
            takes.add(path.name)
            continue
        with pytest.raises(Unusable) as caught:
            fitted(picture, **BRAIN)
        assert caught.value.reason is SkipReason.NO_UNITS
    assert {"CT_small.dcm", "693_UNCR.dcm", "693_J2KR.dcm"} <= takes
    for name in takes:
        header = pydicom.dcmread(shared_data / "dicom_samples" / name, stop_before_pixels=True, force=True)
        assert header.Modality == "CT"


def test_the_head_is_found_and_not_the_headrest(shared_data):
    shades = fitted(opened(shared_data / "ct_head_series" / "14.dcm"), size=512, window=(40.0, 400.0))
    grey = shades[0].astype(np.float32) / 255
    head = body(grey)
    assert 0.1 < head.mean() < 0.6
    rows, columns = np.nonzero(head)
    assert 180 < columns.mean() < 330
    assert (foreground(grey) | head).sum() >= head.sum()


@pytest.mark.parametrize("name", FILMS)
def test_lung_fields_of_real_films(shared_data, name):
    """Most films give two plausible fields, darker than what lies around them in the body."""
    found = 0
    for path in films(shared_data, name, 8):
        grey = greys(path)
        lungs, whole = lung_fields(grey), body(grey)
        assert lungs.any()
        if lungs.sum() < 0.6 * whole.sum():
            found += 1
            left, right = np.array_split(lungs, 2, axis=1)
            assert left.any()
            assert right.any()
            assert grey[lungs].mean() < grey[whole & ~lungs].mean() + 0.05
    assert found >= 5


@pytest.mark.parametrize(
    "steps",
    [
        {"clip_percentiles": (1.0, 99.0)},
        {"mask": "lungs", "crop": "foreground", "resize": "pad"},
        {"crop": "centre", "crop_share": 0.8, "denoise": "median"},
        {"denoise": "non-local-means"},
        {"denoise": "gaussian", "clahe": 0.01},
    ],
    ids=lambda steps: " ".join(steps),
)
def test_every_step_leaves_a_picture_of_real_films(shared_data, steps):
    for name in FILMS:
        for path in films(shared_data, name, 2):
            picture = opened(path)
            channels = 1 if "mask" in steps else 3
            made = fitted(picture, channels=channels, **steps)
            assert made.shape == (channels, 64, 64)
            assert made.std() > 15
            assert np.array_equal(made, fitted(opened(path), channels=channels, **steps))


def test_a_smear_in_colour_is_refused_by_a_grey_model_and_a_film_by_a_colour_model(shared_data):
    smear = next((shared_data / "bccd_detection" / "JPEGImages").glob("*.jpg"))
    film = films(shared_data, "kermany_cxr", 2)[0]
    assert fitted(opened(smear), channels=3, colour="refuse").shape == (3, 64, 64)
    assert fitted(opened(film), colour="refuse").shape == (1, 64, 64)
    for path, channels, reason in ((smear, 1, SkipReason.COLOURED), (film, 3, SkipReason.GREY)):
        with pytest.raises(Unusable) as caught:
            fitted(opened(path), channels=channels, colour="refuse")
        assert caught.value.reason is reason
