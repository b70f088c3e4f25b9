import numpy as np
import pytest
from PIL import Image

from common.intensities import Intensities, ShadeTable, Span, Window, kept_apart
from common.preprocessing import Preprocessing, deep, eight_bits

VALUES = np.linspace(-1000, 3000, 4096).reshape(64, 64)


def test_a_span_takes_values_of_the_picture_and_leaves_out_the_outermost():
    values = np.arange(10_001.0)
    values[-1] = 1e9
    assert Span.of(values) == Span(low=10.0, high=9990.0)
    assert Span.of(values, without=(0, 5000)).low > 5000
    assert Span.of(np.array([np.nan, np.inf])) == Span(low=0, high=0)
    assert not Span(low=3, high=3).shades(values).any()


def test_what_is_not_finite_is_black():
    values = np.array([np.nan, np.inf, -np.inf, 5.0])
    for shown in (Span(low=0, high=5), Window(centre=2, width=6)):
        assert shown.shades(values).tolist() == [0, 0, 0, 1]
    assert ShadeTable(first=0, outputs=np.float32([0, 1])).shades(values).tolist() == [0, 0, 0, 1]


def test_a_window_of_one_step():
    assert Window(centre=10, width=1).shades(np.array([9.0, 9.5, 10.0])).tolist() == [0, 0, 1]


@pytest.mark.parametrize("function", ["LINEAR", "LINEAR_EXACT", "SIGMOID"])
def test_windows_rise_from_black_to_white(function):
    shades = Window(centre=100, width=400, function=function).shades(VALUES.ravel())
    assert (np.diff(shades) >= 0).all()
    assert shades[0] == pytest.approx(0, abs=1e-4)
    assert shades[-1] == pytest.approx(1, abs=1e-4)


def test_values_stay_apart():
    for dtype in (np.uint16, np.int16, np.float32, np.uint32, np.int32, np.float64):
        values = np.array([1, 2**15 - 1, 2**15 - 2]).astype(dtype) + np.array(0, dtype)
        assert len(np.unique(kept_apart(values, values.dtype))) == 3
    assert kept_apart(np.uint32([2**32 - 1, 2**32 - 2]), np.dtype(np.uint32)).dtype == np.float64


@pytest.mark.parametrize("size", [64, 16, 100])
@pytest.mark.parametrize("channels", [1, 3])
def test_deep_pictures_are_resized_before_they_are_rounded(size, channels):
    picture = Intensities(values=VALUES, shown=Window(centre=500, width=900))
    fitted = Preprocessing(image_size=size, channels=channels).fit(picture)
    assert fitted.shape == (channels, size, size)
    assert fitted.dtype == np.uint8
    plane = Image.fromarray(picture.shades()).resize((size, size), Image.Resampling.BILINEAR)
    assert np.array_equal(fitted[0], np.rint(np.asarray(plane) * np.float32(255)).astype(np.uint8))
    assert (fitted == fitted[0]).all()


def test_deep_colours_become_grey_by_the_same_luma():
    colours = np.random.default_rng(0).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    full = Intensities(values=colours * 257.0, shown=Span(low=0, high=65535))
    grey, colour = Preprocessing(image_size=12, channels=1), Preprocessing(image_size=12, channels=3)
    shallow = Image.fromarray(colours)
    assert np.array_equal(colour.fit(full), colour.fit(shallow))
    assert np.abs(grey.fit(full).astype(int) - grey.fit(shallow)).max() <= 1


def test_inverted_is_the_negative():
    picture = deep(np.arange(256, dtype=np.uint16).reshape(16, 16))
    negative = Intensities(values=picture.values, shown=picture.shown, inverted=True)
    assert np.array_equal(eight_bits(negative), 255 - eight_bits(picture))
