import numpy as np
import pytest
import torch
from scipy.stats import chisquare

from client.training.batches import (
    CHUNK_BYTES,
    bytes_per_row,
    chunks_of_units,
    input_tensor,
    minibatches,
    rows_per_chunk,
    sampled_rows,
    target_tensor,
)
from common.config import ModelSpec
from common.models.registry import build_model
from common.preprocessing import Preprocessing
from common.privacy.randomness import ReproducibleRandomness
from tests.client.training.dp_oracle import examples_of, small_network


def stream(step=0):
    return ReproducibleRandomness(1, "here").stream(purpose="sampling", round_number=1, step=step)


def test_all_rows_of_the_sampled_units_and_of_no_other():
    examples = examples_of([1, 5, 2, 0, 1, 4])
    units = np.array([1, 3, 4, 2])
    rows, segments = sampled_rows(units, examples.unit_rows, max_rows_per_unit=10, stream=stream())
    assert sorted(rows) == sorted(np.flatnonzero(np.isin(examples.units, units)))
    assert (units[segments] == examples.units[rows]).all()
    assert (np.diff(segments) >= 0).all()


def test_nobody_sampled_gives_no_rows():
    for examples in (examples_of([1, 5]), examples_of([])):
        nobody = np.empty(0, dtype=np.int64)
        rows, segments = sampled_rows(nobody, examples.unit_rows, max_rows_per_unit=2, stream=stream())
        assert len(rows) == len(segments) == 0
        assert list(chunks_of_units(rows, segments, max_rows=4)) == []


def test_at_most_k_rows_of_a_unit_chosen_uniformly():
    examples = examples_of([7, 1, 3, 2])
    counts = np.zeros(examples.num_rows)
    for step in range(2000):
        rows, segments = sampled_rows(
            np.arange(4), examples.unit_rows, max_rows_per_unit=2, stream=stream(step)
        )
        assert np.bincount(segments).tolist() == [2, 1, 2, 2]
        assert len(set(rows)) == len(rows)
        assert (examples.units[rows] == segments).all()
        counts[rows] += 1
    # Each of the 7 rows of the first unit equally often; alpha 1e-6.
    assert chisquare(counts[examples.units == 0]).pvalue > 1e-6
    assert chisquare(counts[examples.units == 2]).pvalue > 1e-6
    assert (counts[np.isin(examples.units, [1, 3])] == 2000).all()


@pytest.mark.parametrize("max_rows", [1, 2, 4, 5, 6, 13, 100])
def test_chunks_keep_patients_whole_and_bound_the_rows(max_rows):
    counts = [1, 5, 2, 1, 4, 3, 1, 1]
    segments = np.repeat(np.arange(8), counts)
    rows = np.arange(100, 100 + len(segments))
    chunks = list(chunks_of_units(rows, segments, max_rows=max_rows))
    assert sorted(np.concatenate([chunk.rows for chunk in chunks])) == rows.tolist()
    assert sum(chunk.num_units for chunk in chunks) == 8
    for chunk in chunks:
        assert len(chunk.rows) <= max_rows or chunk.num_units == 1
        # No patient is cut, and nobody has somebody else's row.
        for unit in range(chunk.num_units):
            own = chunk.rows[chunk.segments == unit]
            number = segments[own[0] - 100]
            assert own.tolist() == rows[segments == number].tolist()


def test_chunks_of_patients_with_several_images_are_filled():
    """Otherwise every chunk would be filled up with rows of nobody, at the price of real ones."""
    counts = np.random.default_rng(0).integers(2, 6, 300)
    segments = np.repeat(np.arange(300), counts)
    chunks = list(chunks_of_units(np.arange(len(segments)), segments, max_rows=32))
    assert len(chunks) <= -(-len(segments) // 32) + 1


def test_chunks_skip_units_without_rows():
    chunks = list(chunks_of_units(np.array([4, 5, 6]), np.array([0, 0, 3]), max_rows=2))
    assert [chunk.segments.tolist() for chunk in chunks] == [[0, 0], [0]]
    assert [chunk.num_units for chunk in chunks] == [1, 1]


def test_minibatches_see_every_row_once_an_epoch_in_a_new_order():
    randomness = ReproducibleRandomness(1, "here")
    batches = list(minibatches(10, batch_size=4, steps=7, randomness=randomness, round_number=2))
    assert [len(batch) for batch in batches] == [4, 4, 2, 4, 4, 2, 4]
    epochs = [np.concatenate(batches[:3]), np.concatenate(batches[3:6])]
    assert [sorted(epoch) for epoch in epochs] == [list(range(10))] * 2
    assert epochs[0].tolist() != epochs[1].tolist()
    next_round = next(minibatches(10, batch_size=10, steps=1, randomness=randomness, round_number=3))
    assert next_round.tolist() != epochs[0].tolist()
    with pytest.raises(ValueError, match="no rows"):
        next(minibatches(0, batch_size=4, steps=1, randomness=randomness, round_number=1))


def test_memory_of_a_row_is_counted():
    model = small_network()
    convolution = 4 * 9  # the only gradient that a row has of its own; the linear layer's stays a product
    outputs = 3 * 4 * 16 + 64 + 2
    assert bytes_per_row(model, (1, 8, 8)) == 4 * (convolution + 2 * outputs)
    assert not any(layer._forward_hooks for layer in model.modules())


def test_big_models_and_big_images_get_small_chunks():
    def rows(name, size):
        model = build_model(ModelSpec(name=name, channels=1, image_size=size, num_outputs=2))
        return rows_per_chunk(model, (1, size, size), physical_batch_size=256)

    assert rows("cnn-small", 28) == 64
    assert 1 <= rows("resnet18", 28) < 64
    assert rows("cnn", 224) < rows("cnn", 28)
    for name, size in (("resnet18", 28), ("resnet18", 112), ("cnn", 224), ("cnn-flatten", 64)):
        model = build_model(ModelSpec(name=name, channels=1, image_size=size, num_outputs=2))
        assert rows(name, size) * bytes_per_row(model, (1, size, size)) <= CHUNK_BYTES


@pytest.mark.parametrize(
    ("physical", "most", "expected"),
    [(1, 1, 1), (1, 4, 4), (5, 1, 4), (5, 5, 8), (256, 1, 64), (256, 65, 128)],
)
def test_every_chunk_has_one_number_of_rows_a_power_of_two_that_holds_a_patient(physical, most, expected):
    model = small_network()
    found = rows_per_chunk(model, (1, 8, 8), physical_batch_size=physical, max_rows_per_unit=most)
    assert found == expected


def test_chunks_are_filled_up_with_zeros():
    examples, rows = examples_of([2, 1, 3]), np.array([4, 0, 5])
    where = dict(preprocessing=Preprocessing(image_size=8, channels=1), device=torch.device("cpu"))
    inputs = input_tensor(examples, rows, **where, filled_to=8)
    assert inputs[:3].equal(input_tensor(examples, rows, **where))
    assert not inputs[3:].any()
    assert target_tensor(examples, rows, device=torch.device("cpu"), filled_to=8).shape == (8,)
    assert inputs.data_ptr() % 64 == 0
    with pytest.raises(ValueError, match="does not fit"):
        input_tensor(examples, rows, **where, filled_to=2)


def test_tensors_hold_the_asked_rows():
    examples = examples_of([2, 1, 3])
    preprocessing = Preprocessing(image_size=8, channels=1)
    rows = np.array([4, 0, 5])
    inputs = input_tensor(examples, rows, preprocessing=preprocessing, device=torch.device("cpu"))
    expected = (examples.inputs["image"][rows] / 255 - 0.5) / 0.25
    assert inputs.dtype == torch.float32
    assert inputs.is_contiguous()
    assert np.allclose(inputs.numpy(), expected, atol=1e-6)
    targets = target_tensor(examples, rows, device=torch.device("cpu"))
    assert targets.tolist() == examples.targets[rows].tolist()
