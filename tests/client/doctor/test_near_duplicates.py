"""Pictures that are the same to the eye: planted ones are found, others are not, memory stays bounded."""

import io
import tracemalloc

import numpy as np
import pytest
from PIL import Image

from client.doctor.near_duplicates import ALIKE, _details, near_duplicates
from tests.client.doctor.films import film


def stack(pictures, size=64):
    resized = [Image.fromarray(p).resize((size, size), Image.Resampling.BILINEAR) for p in pictures]
    return np.stack([np.asarray(p) for p in resized])[:, None]


def coded_again(pixels, quality):
    stream = io.BytesIO()
    Image.fromarray(pixels).save(stream, "JPEG", quality=quality)
    return np.asarray(Image.open(stream))


def resized(pixels, side):
    return np.asarray(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS))


CHANGES = {
    "coded again": lambda pixels: coded_again(pixels, 40),
    "half the size": lambda pixels: resized(pixels, 32),
    "three times the size": lambda pixels: resized(pixels, 192),
    "another window": lambda pixels: np.clip(pixels * 0.7 + 30, 0, 255).astype(np.uint8),
    "gamma": lambda pixels: (255 * (pixels / 255) ** 0.8).astype(np.uint8),
}


@pytest.mark.parametrize("size", [28, 64])
@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_copy_is_found_and_nothing_else(change, size):
    pictures = [film(number) for number in range(40)]
    pixels = stack([*pictures, CHANGES[change](pictures[7])], size)
    assert near_duplicates(pixels, np.arange(41)) == [[7, 40]]
    assert near_duplicates(pixels, np.arange(40)) == []


def test_a_negative_and_a_mirrored_film_are_other_pictures():
    pictures = [film(number) for number in range(3)]
    others = [255 - pictures[0], pictures[1][:, ::-1], pictures[2][::-1]]
    assert near_duplicates(stack([*pictures, *others]), np.arange(6)) == []


def test_blank_pictures_are_alike_in_nothing():
    blank = [np.full((64, 64), shade, np.uint8) for shade in (0, 0, 1, 255)]
    assert near_duplicates(stack(blank), np.arange(4)) == []


def test_large_pictures_are_brought_down_a_few_at_a_time():
    pixels = np.zeros((40, 3, 512, 512), np.uint8)
    for row in range(40):
        pixels[row] = resized(film(row % 39), 512)
    tracemalloc.start()
    try:
        assert near_duplicates(pixels, np.arange(40)) == [[0, 39]]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 80e6  # all of them as floats are 126 MB


def test_only_the_rows_asked_for_are_compared_and_named():
    pixels = stack([film(0), film(1), film(0), film(2), film(0)])
    assert near_duplicates(pixels, np.array([1, 2, 3, 4])) == [[2, 4]]
    assert near_duplicates(pixels, np.array([], np.int64)) == []


def test_groups_are_those_of_all_pairs_compared_one_by_one(monkeypatch):
    monkeypatch.setattr("client.doctor.near_duplicates._BLOCK", 8)
    pictures = [film(number % 25) for number in range(60)]
    noise = np.random.default_rng(0)
    pictures = [np.clip(p + noise.normal(0, 3, p.shape), 0, 255).astype(np.uint8) for p in pictures]
    pixels = stack(pictures)
    details, _ = _details(pixels, np.arange(60))
    pairs = {(a, b) for b in range(60) for a in range(b) if float(details[a] @ details[b]) > ALIKE}
    assert len(pairs) > 30
    groups = near_duplicates(pixels, np.arange(60))
    assert {frozenset(group) for group in groups} == {frozenset(range(first, 60, 25)) for first in range(25)}
    assert all(any((a, b) in pairs for a in group if a < b) for group in groups for b in group[1:])


def test_five_thousand_pictures_stay_within_sixty_megabytes():
    drawn = np.random.default_rng(0).integers(0, 256, (5000, 1, 28, 28), dtype=np.uint8)
    drawn[4999] = drawn[17]
    tracemalloc.start()
    try:
        assert near_duplicates(drawn, np.arange(5000)) == [[17, 4999]]
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 60e6  # 5 MB of details and one block of 2048 x 2048, a few times
