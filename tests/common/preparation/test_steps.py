"""Each step of `[preprocessing]` on pictures whose answer is known."""

import numpy as np
import pytest
from PIL import Image
from scipy import ndimage
from skimage.exposure import equalize_adapthist
from skimage.restoration import denoise_nl_means

from common.intensities import Intensities, Span
from common.preparation.foreground import body, box_of, foreground, lung_fields
from common.preparation.problems import CannotPrepareError, Problem
from common.preparation.settings import PreprocessingSection
from common.preprocessing import Preprocessing

RNG = np.random.default_rng(0)
NOISE = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
SMOOTH = np.rint(ndimage.gaussian_filter(RNG.normal(size=(32, 32)), 3) * 700 + 128).clip(0, 255)
SMOOTH = SMOOTH.astype(np.uint8)


def fitted(pixels, *, size=32, channels=1, **steps):
    picture = pixels if isinstance(pixels, Intensities) else Image.fromarray(pixels)
    made = Preprocessing(image_size=size, channels=channels, steps=PreprocessingSection(**steps)).fit(picture)
    assert made.dtype == np.uint8
    assert made.shape == (channels, size, size)
    return made


def deep(values, *, hounsfield=True, inverted=False):
    values = np.asarray(values, np.float32)
    return Intensities(values=values, shown=Span.of(values), inverted=inverted, is_hounsfield=hounsfield)


def refused(*arguments, **steps):
    with pytest.raises(CannotPrepareError) as caught:
        fitted(*arguments, **steps)
    return caught.value.problem


def square(size=100, top=30, left=20, side=40, shade=200):
    pixels = np.zeros((size, size), np.uint8)
    pixels[top : top + side, left : left + side] = shade
    return pixels


# --- window and percentiles ---


def test_a_window_in_hounsfield_units():
    values = np.linspace(-1000, 1000, 32 * 32).reshape(32, 32)
    expected = np.rint(((values - 40) / 400 + 0.5).clip(0, 1) * 255)
    found = fitted(deep(values), window=(40, 400))
    assert np.abs(found[0] - expected).max() <= 1
    assert found.min() == 0
    assert found.max() == 255
    assert np.array_equal(fitted(deep(values, inverted=True), window=(40, 400)), 255 - found)


def test_a_window_needs_the_units_it_is_in():
    values = deep(np.linspace(-1000, 1000, 1024).reshape(32, 32), hounsfield=False)
    assert refused(values, window=(40, 400)) is Problem.NO_UNITS
    assert fitted(values, window=(40, 400), window_units="file").max() == 255
    for units in ("hounsfield", "file"):
        assert refused(NOISE, window=(40, 400), window_units=units) is Problem.NO_UNITS


@pytest.mark.parametrize("picture", [NOISE, SMOOTH])
def test_percentiles_clip_each_picture_by_itself(picture):
    low, high = np.percentile(picture, (5, 95))
    expected = np.rint(((picture - low) / (high - low)).clip(0, 1) * 255)
    assert np.abs(fitted(picture, clip_percentiles=(5, 95))[0] - expected).max() <= 1
    assert np.array_equal(
        fitted(picture, clip_percentiles=(5, 95)),
        fitted(deep(picture.astype(np.float32) * 16 - 300), clip_percentiles=(5, 95)),
    ), "whatever the units"
    flat = np.full((32, 32), 9, np.uint8)
    assert not fitted(flat, clip_percentiles=(5, 95)).any()


# --- colour ---


def test_colour_is_converted_or_refused():
    film = np.repeat(SMOOTH[..., None], 3, axis=2)
    photograph = RNG.integers(0, 256, (32, 32, 3), dtype=np.uint8)
    steps = {"colour": "refuse"}
    assert np.abs(fitted(film, **steps)[0].astype(int) - SMOOTH).max() <= 1
    assert np.array_equal(fitted(photograph, channels=3, **steps), photograph.transpose(2, 0, 1))
    assert refused(photograph, **steps) is Problem.COLOURED
    assert refused(film, channels=3, **steps) is Problem.GREY
    assert refused(SMOOTH, channels=3, **steps) is Problem.GREY
    assert fitted(SMOOTH, channels=3, resize="pad").std(axis=0).max() == 0


# --- crop and mask ---


def test_the_centre_is_cut_out():
    pixels = RNG.integers(0, 256, (64, 48), dtype=np.uint8)
    expected = np.asarray(
        Image.fromarray(pixels[16:48, 12:36].astype(np.float32)).resize((24, 24), Image.Resampling.BILINEAR)
    )
    found = fitted(pixels, size=24, crop="centre", crop_share=0.5)
    assert np.abs(found[0] - expected).max() <= 1


def test_foreground_is_the_box_of_the_planted_square():
    assert box_of(foreground(square().astype(np.float32) / 255)) == (30, 70, 20, 60)
    assert (fitted(square(), size=40, crop="foreground", crop_margin=0.0) == 200).all()
    wider = fitted(square(), size=48, crop="foreground", crop_margin=0.1)[0]
    assert (wider[4:44, 4:44] == 200).all()
    assert wider[:3].max() == 0


def test_foreground_of_a_large_picture_is_right_to_a_cell_of_the_grid():
    box = box_of(foreground(square(size=1000, top=300, left=200, side=400).astype(np.float32) / 255))
    assert np.abs(np.subtract(box, (300, 700, 200, 600))).max() <= 6


def test_markers_are_no_body():
    film = square(size=200, top=40, left=40, side=120, shade=150)
    film[60:100, 60:100] = 5  # a lung
    film[10:20, 10:24] = 255  # a letter
    kept = body(film.astype(np.float32) / 255)
    assert kept[80, 80], "holes are filled"
    assert not kept[15, 15]
    masked = fitted(film, size=200, mask="body")[0]
    assert masked[15, 15] == 0
    assert np.array_equal(masked[45:155, 45:155], film[45:155, 45:155])


def test_what_is_empty_or_too_small_is_refused():
    black = np.zeros((64, 64), np.uint8)
    assert refused(black, crop="foreground") is Problem.NO_FOREGROUND
    assert refused(black, mask="body") is Problem.NO_FOREGROUND
    assert refused(square(side=12), size=32, crop="foreground") is Problem.TOO_SMALL
    assert refused(NOISE, size=64, crop="centre", crop_share=0.9) is Problem.TOO_SMALL
    assert fitted(NOISE, size=48, crop="centre", crop_share=0.9).any()


def chest(height=240, width=220):
    """Bright body, two dark ellipses, dark air around it."""
    rows, columns = np.mgrid[:height, :width]
    film = np.zeros((height, width), np.float32)
    film[10:, 15:205] = 0.7
    lungs = np.zeros((height, width), bool)
    for middle in (70, 150):
        lungs |= ((rows - 115) / 70) ** 2 + ((columns - middle) / 28) ** 2 < 1
    film[lungs] = 0.25
    film += RNG.normal(0, 0.02, film.shape).astype(np.float32)
    return film.clip(0, 1), lungs


def test_lung_fields_of_a_generated_film():
    film, lungs = chest()
    found = lung_fields(film)
    assert found.sum() < 1.7 * lungs.sum(), "widened on purpose, but not that much"
    assert found[lungs].mean() > 0.97
    assert not found[115, 110], "the mediastinum is none"


def test_where_no_two_lungs_are_found_the_body_is_kept():
    film, _ = chest()
    film[:, 110:205][film[:, 110:205] < 0.5] = 0.7  # one white lung
    film[:10], film[:, 205:] = 0, 0
    assert np.array_equal(lung_fields(film), body(film))


# --- resize ---


def test_padding_keeps_the_aspect_in_the_middle_of_black():
    found = fitted(np.full((40, 20), 100, np.uint8), size=32, resize="pad")[0]
    assert (found[:, 8:24] == 100).all()
    assert not found[:, :8].any()
    assert not found[:, 24:].any()
    flat = fitted(np.full((3, 300), 100, np.uint8), size=32, resize="pad")[0]
    assert flat.any(axis=1).sum() == 1


def test_stretching_with_other_steps_is_as_without_any():
    pixels = RNG.integers(0, 256, (50, 40), dtype=np.uint8)
    plain = Preprocessing(image_size=32, channels=1).fit(Image.fromarray(pixels))
    again = fitted(pixels, colour="refuse")
    assert np.abs(plain.astype(int) - again).max() <= 1


# --- filters: what the libraries say by hand ---


def rounded(shades):
    return np.rint(np.clip(shades, 0, 1) * 255)


def test_gaussian_and_median_are_scipys():
    shades = (NOISE / np.float32(255)).astype(np.float32)
    blurred = ndimage.gaussian_filter(shades, 1.5, mode="nearest")
    found = fitted(NOISE, denoise="gaussian", denoise_strength=1.5)[0]
    assert np.array_equal(found, rounded(blurred))
    found = fitted(NOISE, denoise="median", denoise_strength=2.0)[0]
    assert np.array_equal(found, ndimage.median_filter(NOISE, size=5, mode="nearest"))


@pytest.mark.parametrize("channels", [1, 3])
def test_non_local_means_is_scikit_images_and_calms_noise(channels):
    noisy = np.clip(SMOOTH + np.random.default_rng(1).normal(0, 8, SMOOTH.shape), 0, 255).astype(np.uint8)
    picture = noisy if channels == 1 else np.stack([noisy, noisy[::-1], noisy[:, ::-1]], axis=2)
    shades = (picture / np.float32(255)).astype(np.float32)
    expected = denoise_nl_means(
        shades,
        patch_size=5,
        patch_distance=6,
        h=0.05,
        fast_mode=True,
        channel_axis=None if channels == 1 else -1,
    )
    found = fitted(picture, channels=channels, denoise="non-local-means")
    assert np.array_equal(found, np.atleast_3d(rounded(expected)).transpose(2, 0, 1))
    if channels == 1:
        before, after = (np.abs(p.astype(int) - SMOOTH).mean() for p in (noisy, found[0]))
        assert after < 0.8 * before


def test_clahe_is_scikit_images():
    shades = (SMOOTH / np.float32(255)).astype(np.float32)
    expected = equalize_adapthist(shades, kernel_size=(8, 8), clip_limit=0.02)
    assert np.array_equal(fitted(SMOOTH, clahe=0.02, clahe_tiles=4)[0], rounded(expected.astype(np.float32)))
    flat = np.full((32, 32), 90, np.uint8)
    assert (fitted(flat, clahe=0.02) == 90).all()


def test_a_mask_is_black_after_all_filters_and_padding_stays_black():
    film, _ = chest()
    found = fitted(
        (film * 255).astype(np.uint8), size=64, mask="lungs", clahe=0.02, denoise="gaussian", resize="pad"
    )
    share = (found > 0).mean()
    assert 0.1 < share < 0.5


# --- all together ---

EVERYTHING = [
    {"clip_percentiles": (1, 99), "mask": "lungs", "crop": "foreground", "resize": "pad", "clahe": 0.01},
    {"denoise": "non-local-means", "crop": "centre", "crop_share": 0.8},
    {"mask": "body", "denoise": "median", "resize": "pad"},
]


@pytest.mark.parametrize("steps", EVERYTHING)
def test_pictures_change_nothing_of_each_other_and_the_same_comes_out_twice(steps):
    film = (chest()[0] * 255).astype(np.uint8)
    first = fitted(film, size=48, **steps)
    fitted(film[::-1], size=48, **steps)
    assert np.array_equal(fitted(film, size=48, **steps), first)
    preprocessing = Preprocessing(image_size=48, channels=1, steps=PreprocessingSection(**steps))
    stacked = preprocessing.fit_array(np.stack([film, film[:, ::-1], film]))
    assert np.array_equal(stacked[0], first)
    assert np.array_equal(stacked[2], first)
