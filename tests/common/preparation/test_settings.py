"""`[preprocessing]`: as installed nothing changes; impossible combinations are refused with what to write."""

import json

import numpy as np
import pytest
from PIL import Image

from common.config import FederationConfig, PublicPlan
from common.errors import ConfigError
from common.preparation.settings import AS_INSTALLED, PreprocessingSection
from common.preprocessing import Preprocessing
from common.settings import from_flat, parse, to_flat, with_overrides

RNG = np.random.default_rng(0)


def plan(*overrides):
    return parse(FederationConfig, with_overrides({}, overrides), source="federation.toml")


def test_as_installed_the_stored_form_is_that_of_earlier_releases():
    assert Preprocessing(image_size=28, channels=1).to_dict() == {
        "image_size": 28,
        "channels": 1,
        "resize": "bilinear-antialiased",
        "centre": 0.5,
        "spread": 0.25,
        "depth": "window, table or 0.001..0.999 quantiles",
    }
    assert Preprocessing(image_size=28, channels=1).mark == ""
    assert not AS_INSTALLED.changes_pixels
    assert Preprocessing.of(PublicPlan()) == Preprocessing(image_size=28, channels=1)


def test_as_installed_the_bits_are_those_of_earlier_releases():
    """Written out again here: resized by Pillow as 8 bits, (x / 255 - 0.5) / 0.25 in float32."""
    preprocessing = Preprocessing.of(plan("data.image-size=20"))
    pixels = RNG.integers(0, 256, (33, 47), dtype=np.uint8)
    expected = np.asarray(Image.fromarray(pixels).resize((20, 20), Image.Resampling.BILINEAR))
    found = preprocessing.fit(Image.fromarray(pixels))
    assert np.array_equal(found[0], expected)
    values = expected.astype(np.float32)
    values *= np.float32(1 / 63.75)
    values -= np.float32(2)
    assert np.array_equal(preprocessing.standardise(found)[0], values)


def test_it_travels_with_the_plan_and_lies_beside_the_model():
    config = plan(
        "preprocessing.clip_percentiles=[0.5, 99.5]",
        "preprocessing.crop=foreground",
        "preprocessing.resize=pad",
        "preprocessing.mean=[0.4]",
    )
    arrived = from_flat(PublicPlan, to_flat(config.public_plan))
    preprocessing = Preprocessing.of(arrived)
    assert preprocessing == Preprocessing.of(config)
    stored = json.loads(json.dumps(preprocessing.to_dict()))
    assert Preprocessing.from_dict(stored) == preprocessing
    assert stored["steps"]["clip-percentiles"] == [0.5, 99.5]
    assert preprocessing.mark
    assert preprocessing.mark == Preprocessing.of(plan(*CROPPED)).mark, "without standardisation"


CROPPED = (
    "preprocessing.clip-percentiles=[0.5, 99.5]",
    "preprocessing.crop=foreground",
    "preprocessing.resize=pad",
)


def test_a_release_without_steps_refuses_a_model_with_them():
    stored = Preprocessing.of(plan("preprocessing.resize=pad")).to_dict()
    as_earlier_releases_read = {"resize": "bilinear-antialiased", "centre": 0.5, "spread": 0.25}
    assert all(stored[key] != value for key, value in as_earlier_releases_read.items())


@pytest.mark.parametrize(
    "change", [{"resize": "cubic"}, {"steps": {"sharpen": 1}}, {"steps": {"crop": "centre"}}, {"channels": 2}]
)
def test_what_this_release_does_not_do_is_refused(change):
    stored = Preprocessing.of(plan("preprocessing.resize=pad")).to_dict()
    with pytest.raises(ValueError, match=r"preprocessing|channels"):
        Preprocessing.from_dict(stored | change)


def test_standardising_by_channel_none_and_one_number():
    pixels = RNG.integers(0, 256, (4, 3, 8, 8), dtype=np.uint8)
    shades = pixels / 255

    def values(**steps):
        return Preprocessing(image_size=8, channels=3, steps=PreprocessingSection(**steps)).standardise(
            pixels
        )

    mean, deviation = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    by_hand = (shades - np.reshape(mean, (3, 1, 1))) / np.reshape(deviation, (3, 1, 1))
    found = values(mean=mean, standard_deviation=deviation)
    assert found.dtype == np.float32
    assert np.allclose(found, by_hand, atol=1e-5)
    assert np.allclose(values(standardise="none"), shades, atol=1e-7)
    assert np.allclose(values(mean=(0.1,)), (shades - 0.1) / 0.25, atol=1e-5)


@pytest.mark.parametrize(
    ("overrides", "why", "fix"),
    [
        (["window=[40]"], "centre and a width", "window = [40, 400]"),
        (["window=[40, 0]"], "width above 0", "window = [40, 400]"),
        (["window=[40, 400]", "clip_percentiles=[1, 99]"], "both", "one of them"),
        (["window-units=file"], "no window", "window ="),
        (["clip-percentiles=[99, 1]"], "rise", "clip-percentiles = [0.5, 99.5]"),
        (["crop=centre"], "keeps everything", "crop-share = 0.9"),
        (["crop-share=0.5"], "crop = 'centre'", "write that"),
        (["crop-margin=0.3"], "crop = 'foreground'", "write that"),
        (["denoise-strength=2"], "no filter", "denoise ="),
        (["denoise=median", "denoise-strength=1.5"], "whole pixels", "denoise-strength = 1"),
        (["clahe-tiles=4"], "without CLAHE", "clahe = 0.01"),
        (["clahe=0.01", "clahe-tiles=10"], "smaller than 4 px", "clahe-tiles = 7"),
        (["standardise=none", "mean=[0.4]"], "uses no mean", "standardise = 'fixed'"),
        (["mean=[0.4, 0.5]"], "1 or 3 channels", "one number, or three"),
        (["mean=[0.4, 0.5, 0.6]"], "other lengths", "one for each channel"),
        (["standard-deviation=[0.0]"], "above 0", "standard-deviation = [0.25]"),
        (["denoise=bilateral"], "", "model's pixels"),
        (["sharpen=1"], "", "known keys|did you mean"),
    ],
)
def test_impossible_combinations_say_what_why_and_what_to_write(overrides, why, fix):
    with pytest.raises(ConfigError) as caught:
        plan(*(f"preprocessing.{override}" for override in overrides))
    assert why in caught.value.why
    assert any(word in caught.value.fix for word in fix.split("|"))


@pytest.mark.parametrize(
    "overrides",
    [
        ["data.channels=3", "preprocessing.window=[40, 400]"],
        ["data.channels=3", "preprocessing.mask=lungs"],
        ["model.name=scattering", "preprocessing.standardise=none"],
        ["model.name=scattering", "preprocessing.mean=[0.4]"],
    ],
)
def test_combinations_with_other_sections_are_refused_too(overrides):
    with pytest.raises(ConfigError) as caught:
        plan(*overrides)
    assert caught.value.why
    assert caught.value.fix
    assert plan("model.name=scattering", "preprocessing.crop=foreground").preprocessing.changes_pixels
