"""Models of series: the numbers of torch's own recurrent layers, and padding that reaches nothing."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_padded_sequence

from common.config import MOST_STEPS, ModelSpec
from common.errors import ModelError
from common.models.over_steps import OverSteps, steps_by_layer
from common.models.recurrence import GATES, Recurrence
from common.models.registry import build_model
from common.models.series import with_real_steps
from common.privacy.noise import MOST_POSITIONS
from tests.model_names import OF_SERIES, SHALLOW

SIZE, STEPS = 17, 5
PIXELS = SIZE**2
RECURRENT = ("rnn", "gru", "lstm")
THEIRS = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}


def build(name, *, steps=STEPS, activation="tanh"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        spec = ModelSpec(
            name=name, channels=1, image_size=SIZE, num_outputs=2, steps=steps, activation=activation
        )
        return build_model(spec)


def series(lengths, *, steps=STEPS, seed=0):
    """Random series of those lengths, padded with zeros."""
    generator = torch.Generator().manual_seed(seed)
    found = torch.randn(len(lengths), steps, PIXELS + 2, generator=generator)
    real = torch.arange(steps) < torch.tensor(lengths)[:, None]
    found[..., -2], found[..., -1] = 1.0, found[..., -1].abs()
    found[:, 0, -1] = 0
    return found * real[..., None]


def outputs_and_gradients(model, inputs):
    """Outputs, and the gradient of a sum in which every row counts differently."""
    model.zero_grad()
    outputs = model(inputs)
    (outputs * torch.arange(1.0, 1 + outputs.numel()).view_as(outputs)).sum().backward()
    return outputs.detach(), torch.cat([parameter.grad.flatten() for parameter in model.parameters()])


@pytest.mark.parametrize("kind", RECURRENT)
def test_the_recurrence_is_that_of_torch_also_for_series_of_unequal_length(kind):
    lengths, width, units = [5, 1, 3, 4], 7, 6
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(4, STEPS, width, generator=generator, dtype=torch.float64)
    theirs = THEIRS[kind](width, units, batch_first=True).double()
    ours = Recurrence(kind, units).double()
    gates = nn.Linear(width, GATES[kind] * units).double()
    with torch.no_grad():
        gates.weight.copy_(theirs.weight_ih_l0)
        gates.bias.copy_(theirs.bias_ih_l0)
        ours.weight.copy_(theirs.weight_hh_l0)
        more = theirs.bias_hh_l0.clone()
        if kind == "gru":
            ours.bias.copy_(more[2 * units :])
            more[2 * units :] = 0
        gates.bias.add_(more)
    packed = pack_padded_sequence(inputs, torch.tensor(lengths), batch_first=True, enforce_sorted=False)
    last = theirs(packed)[1]
    expected = (last[0] if kind == "lstm" else last).squeeze(0)
    real = torch.arange(STEPS) < torch.tensor(lengths)[:, None]
    found = ours(gates(inputs), real)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    ours_towards = torch.autograd.grad(found.square().sum(), [gates.weight, ours.weight, gates.bias])
    theirs_towards = torch.autograd.grad(
        expected.square().sum(), [theirs.weight_ih_l0, theirs.weight_hh_l0, theirs.bias_ih_l0]
    )
    for own, their in zip(ours_towards, theirs_towards, strict=True):
        torch.testing.assert_close(own, their, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("name", OF_SERIES)
@pytest.mark.parametrize("held", [1e30, float("nan"), float("inf")])
def test_what_padding_holds_reaches_neither_output_nor_gradient(name, held):
    model, lengths = build(name), [1, STEPS, 3, 0]
    inputs = series(lengths)
    expected = outputs_and_gradients(model, inputs)
    for row, length in enumerate(lengths):
        inputs[row, length:, :-2] = held
        inputs[row, length:, -1] = held
    for found, wanted in zip(outputs_and_gradients(model, inputs), expected, strict=True):
        assert torch.isfinite(wanted).all()
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("name", OF_SERIES)
@settings(max_examples=10, deadline=None)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=3), st.integers(1, 3), st.integers(0, 9))
def test_more_padding_changes_nothing(name, lengths, more, seed):
    inputs = series(lengths, steps=4, seed=seed)
    longer = torch.cat([inputs, torch.zeros(len(lengths), more, PIXELS + 2)], dim=1)
    expected = outputs_and_gradients(build(name, steps=4), inputs)
    found = outputs_and_gradients(build(name, steps=4 + more), longer)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", RECURRENT)
def test_order_gaps_and_earlier_images_count(name):
    model, inputs = build(name), series([STEPS, STEPS])
    swapped, later, other = inputs.clone(), inputs.clone(), inputs.clone()
    swapped[:, [1, 2], :-2] = swapped[:, [2, 1], :-2]
    later[:, 2, -1] += 5
    other[:, 0, :-2] *= -1
    for changed in (swapped, later, other):
        assert not torch.allclose(model(changed), model(inputs), rtol=1e-4, atol=1e-6)


def test_the_last_image_alone_counts_for_the_model_of_that_name():
    model, inputs = build("last-image"), series([3, STEPS, 1])
    changed = inputs.clone()
    changed[0, :2, :-2], changed[1, :4, :-2] = 7.0, -7.0
    assert torch.equal(model(changed), model(inputs))
    changed[0, 2, :-2] = 1.0
    assert not torch.allclose(model(changed)[0], model(inputs)[0])


def test_its_encoder_is_that_of_the_recurrent_models():
    newest = dict(build("last-image").encoder.named_parameters())
    over_all = dict(build("lstm").encoder.layers.named_parameters())
    assert {name: value.shape for name, value in newest.items()} == {
        name: value.shape for name, value in over_all.items()
    }


@pytest.mark.parametrize("name", OF_SERIES)
def test_single_images_refuse_a_model_of_series(name):
    with pytest.raises(ModelError, match=f"{name} is for series of images"):
        build(name, steps=1)


@pytest.mark.parametrize("name", SHALLOW)
def test_series_refuse_a_model_of_single_images_and_name_those_that_fit(name):
    with pytest.raises(ModelError, match=f"{name} is for single images.*last-image, rnn, gru, lstm"):
        build(name, steps=2)


def test_rows_times_steps_are_paid_for():
    from client.training.batches import CHUNK_ROWS

    assert CHUNK_ROWS * MOST_STEPS <= MOST_POSITIONS


def test_over_steps_says_how_many_inputs_are_of_one_record():
    inner = nn.Linear(2, 2)
    model = nn.Sequential(OverSteps(3, nn.Sequential(nn.Tanh(), OverSteps(2, inner))), nn.Linear(2, 1))
    found = steps_by_layer(model)
    assert (found[inner], found[model[1]], found[model[0].layers[0]]) == (6, 1, 3)
    with pytest.raises(ValueError, match="expected 3 steps, got 4"):
        model[0](torch.zeros(5, 4, 2))


def test_made_up_series_have_real_steps_and_made_up_images_stay():
    made_up = torch.randn(4, 3, PIXELS + 2)
    found = with_real_steps(build("gru", steps=3), made_up)
    assert found[..., -2].tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [1, 1, 1]]
    assert torch.equal(found[..., :-2], made_up[..., :-2])
    assert with_real_steps(nn.Linear(2, 2), made_up) is made_up
