"""Simple features on pictures whose answers are known."""

import numpy as np
import pytest

from simulations.baselines.features import (
    BINS,
    GRID,
    NUM_GRADIENTS,
    ORIENTATIONS,
    grid_means,
    histogram,
    oriented_gradients,
    simple_features,
)


def pictures(value, *, size=32, channels=1, rows=1):
    return np.full((rows, channels, size, size), value, np.uint8)


def test_a_constant_picture_has_one_shade_one_bin_and_no_edge():
    images = pictures(51)
    np.testing.assert_allclose(grid_means(images), 0.2, rtol=1e-6)
    shares = histogram(images)[0]
    assert shares[51 // (256 // BINS)] == 1
    assert shares.sum() == 1
    assert not oriented_gradients(images).any()


@pytest.mark.parametrize("size", [8, 10, 11, 15, 28, 33])
def test_grid_means_are_those_of_slow_loops_and_the_width_knows_no_size(size):
    rng = np.random.default_rng(size)
    images = rng.integers(0, 256, (2, 3, size, size), dtype=np.uint8)
    edges = [size * i // GRID for i in range(GRID + 1)]
    slow = [
        images[row, channel, edges[i] : edges[i + 1], edges[j] : edges[j + 1]].mean() / 255
        for row in range(2)
        for channel in range(3)
        for i in range(GRID)
        for j in range(GRID)
    ]
    np.testing.assert_allclose(grid_means(images).ravel(), slow, rtol=1e-5)
    features = simple_features(images)
    assert features.shape == (2, 3 * GRID**2 + 3 * BINS + NUM_GRADIENTS)
    assert features.dtype == np.float32
    assert np.isfinite(features).all()


def test_histogram_keeps_channels_and_rows_apart():
    images = np.concatenate([pictures(0, channels=3), pictures(255, channels=3)])
    images[0, 2, :16] = 255
    first, second = histogram(images).reshape(2, 3, BINS)
    assert first[0, 0] == first[1, 0] == 1
    assert (first[2, 0], first[2, -1]) == (0.5, 0.5)
    assert (second[:, -1] == 1).all()


def test_a_planted_edge_is_where_it_is_and_points_across_it():
    upright = pictures(0)
    upright[..., 4:] = 200  # inside the first column of cells of 8 pixels
    lying = upright.swapaxes(2, 3)
    # 3 by 3 blocks of 2 by 2 cells.
    found = oriented_gradients(upright).reshape(3, 3, 2, 2, ORIENTATIONS)
    turned = oriented_gradients(lying).reshape(3, 3, 2, 2, ORIENTATIONS)
    assert found[:, 0, :, 0].any(axis=-1).all()
    assert not found[:, 1:].any()
    assert not found[:, 0, :, 1].any()
    # The shade changes along a row (0 degrees) or along a column (90 of 180 degrees).
    assert set(np.flatnonzero(found.any(axis=(0, 1, 2, 3)))) == {0}
    assert set(np.flatnonzero(turned.any(axis=(0, 1, 2, 3)))) == {ORIENTATIONS // 2}


def test_a_row_depends_on_nothing_but_its_picture():
    images = np.random.default_rng(0).integers(0, 256, (300, 1, 12, 12), dtype=np.uint8)
    whole = simple_features(images)
    assert np.array_equal(whole, simple_features(images))
    assert np.array_equal(whole[270:], simple_features(images[270:]))
    assert simple_features(images[:0]).shape == (0, whole.shape[1])


@pytest.mark.parametrize("images", [pictures(0, size=7), pictures(0)[0], pictures(0).astype(np.float32)])
def test_other_arrays_are_refused(images):
    with pytest.raises(ValueError, match="expected uint8"):
        simple_features(images)
