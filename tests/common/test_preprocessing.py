import json

import numpy as np
import pytest
from PIL import Image

from common.preprocessing import Preprocessing, upright

RAMP = np.linspace(0, 255, 24 * 24).astype(np.uint8).reshape(24, 24)


def grey(size=24):
    return Preprocessing(image_size=size, channels=1)


def colour(size=24):
    return Preprocessing(image_size=size, channels=3)


def test_the_right_size_is_left_as_it_is():
    assert np.array_equal(grey().fit(Image.fromarray(RAMP))[0], RAMP)
    assert np.array_equal(grey().fit_array(RAMP[None])[0, 0], RAMP)


@pytest.mark.parametrize(
    "image",
    [
        Image.fromarray(RAMP).convert("RGB"),
        Image.fromarray(RAMP).convert("RGBA"),
        Image.fromarray(RAMP).convert("LA"),
        Image.fromarray(RAMP).convert("P"),
        Image.fromarray(RAMP.astype(np.uint16) * 257),
        Image.fromarray((RAMP.astype(np.uint16) * 257).astype(np.int32)),
        Image.fromarray((RAMP / 255).astype(np.float32)),
        Image.fromarray(RAMP.astype(np.float32)),
    ],
    ids=["RGB", "RGBA", "LA", "P", "I;16", "I", "F 0..1", "F 0..255"],
)
def test_every_mode_shows_the_same_picture(image):
    fitted = grey().fit(image)
    assert fitted.dtype == np.uint8
    assert fitted.shape == (1, 24, 24)
    assert np.abs(fitted[0].astype(int) - RAMP).max() <= 1
    assert np.abs(colour().fit(image).astype(int) - RAMP).max() <= 1


def test_twelve_bit_data_in_a_16_bit_file_stay_visible():
    scan = Image.fromarray((RAMP.astype(np.uint16) << 4) + 15)  # 15 .. 4095
    assert np.abs(grey().fit(scan)[0].astype(int) - RAMP).max() <= 1


def test_black_and_white_cmyk_and_transparency():
    bits = Image.fromarray(RAMP > 127)
    assert bits.mode == "1"
    assert np.array_equal(grey().fit(bits)[0], np.where(RAMP > 127, 255, 0))
    ink = Image.new("CMYK", (24, 24), (0, 255, 255, 0))  # red
    assert colour().fit(ink)[:, 0, 0].tolist() == [255, 0, 0]
    clear = Image.new("RGBA", (24, 24), (255, 255, 255, 0))
    assert not colour().fit(clear).any()
    palette = Image.new("P", (24, 24), 1)
    palette.putpalette([0, 0, 0, 200, 10, 20])
    assert colour().fit(palette)[:, 5, 5].tolist() == [200, 10, 20]


def test_negative_and_non_finite_pixels_become_black():
    wild = RAMP.astype(np.float32)
    wild[0, :4] = [-3, np.nan, np.inf, -np.inf]
    assert not grey().fit(Image.fromarray(wild))[0, 0, :4].any()
    assert not grey().fit(Image.fromarray(np.zeros((24, 24), np.float32))).any()


def test_exif_orientation_is_applied():
    exif = Image.Exif()
    exif[0x0112] = 6  # stored turned: the viewer must turn by 90 degrees clockwise
    image = Image.fromarray(RAMP)
    image.info["exif"] = exif.tobytes()
    image.getexif()[0x0112] = 6
    assert np.array_equal(grey().fit(image)[0], np.rot90(RAMP, -1))
    assert np.array_equal(np.asarray(upright(upright(image))), np.rot90(RAMP, -1))


@pytest.mark.parametrize("size", [(1, 1), (3000, 1), (1, 3000), (7, 5)])
def test_any_shape_becomes_the_square(size):
    fitted = grey(28).fit(Image.new("L", size, 77))
    assert fitted.shape == (1, 28, 28)
    assert (fitted == 77).all()


def test_shrinking_averages_instead_of_dropping_pixels():
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    assert np.abs(grey(8).fit(Image.fromarray(stripes))[0][:, 1:-1].astype(int) - 127).max() <= 4


@pytest.mark.parametrize("preprocessing", [grey(24), grey(10), colour(24), colour(10)])
@pytest.mark.parametrize("shape", [(5, 24, 24), (5, 24, 24, 3), (5, 30, 17), (5, 30, 17, 3)])
def test_arrays_and_pictures_give_the_same_pixels(preprocessing, shape):
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    one_by_one = np.stack([preprocessing.fit(Image.fromarray(pixels)) for pixels in images])
    assert np.array_equal(preprocessing.fit_array(images), one_by_one)


@pytest.mark.parametrize(
    "images", [np.zeros((2, 8, 8)), np.zeros((2, 8), np.uint8), np.zeros((2, 8, 8, 4), np.uint8)]
)
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match="uint8"):
        grey().fit_array(images)


def test_standardised_values_follow_the_formula():
    pixels = np.arange(256, dtype=np.uint8).reshape(1, 1, 16, 16)
    values = grey(16).standardise(pixels)
    assert values.dtype == np.float32
    assert np.allclose(values, (pixels / 255 - 0.5) / 0.25, atol=1e-6)
    assert values.min() == -2
    assert values.max() == pytest.approx(2, abs=1e-6)


def test_it_survives_the_way_through_json():
    stored = json.loads(json.dumps(colour(64).to_dict()))
    assert Preprocessing.from_dict(stored) == colour(64)
    with pytest.raises(ValueError, match="resize"):
        Preprocessing.from_dict(stored | {"resize": "nearest"})
    with pytest.raises(ValueError, match="image_size"):
        Preprocessing.from_dict({"channels": 1})
    with pytest.raises(ValueError, match="channels"):
        Preprocessing(image_size=28, channels=2)
