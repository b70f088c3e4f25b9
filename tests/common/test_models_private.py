"""What DP-SGD asks of a network: records stay apart, and Opacus hooks see every one of them."""

import pytest
import torch
from opacus import GradSampleModule
from opacus.validators import ModuleValidator
from torch import nn

from common.errors import BatchNormError
from common.models.names import MODELS
from common.models.private_layers import grid_pool, group_norm, refuse_batch_norm
from common.models.recurrence import Recurrence
from common.models.registry import build_model, model_names
from tests.model_names import OF_SERIES, SHALLOW, each_model, shape_of, spec_of

TRAINABLE = {nn.Conv2d, nn.Linear, nn.GroupNorm, Recurrence}


def build(name, *, channels=1, image_size=28, activation="tanh"):
    torch.manual_seed(0)
    model = build_model(
        spec_of(name, channels=channels, image_size=image_size, num_outputs=3, activation=activation)
    )
    if name == "scattering":  # it starts at zero, where all records look alike
        nn.init.normal_(model.output.weight)
    return model


def images(rows, *, channels=1, image_size=28):
    return torch.randn(rows, channels, image_size, image_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", model_names())
def test_outputs_of_a_record_do_not_depend_on_the_others(name):
    generator = torch.Generator().manual_seed(1)
    model, batch = build(name), torch.randn(4, *shape_of(spec_of(name)), generator=generator)
    if name in OF_SERIES:
        batch[..., -2] = 1.0
    changed = batch.clone()
    changed[3] = 1e3
    outputs, others = model(batch), model(changed)
    assert torch.equal(outputs[:3], others[:3])
    assert not torch.allclose(outputs[3], others[3])


@pytest.mark.parametrize("name", model_names())
def test_no_state_and_only_exact_types_with_parameters(name):
    for image_size in (28, 65):
        with torch.device("meta"):
            model = build(name, image_size=image_size)
        assert list(model.state_dict()) == [key for key, _ in model.named_parameters()]
        assert name == "scattering" or not list(model.buffers())
        holders = {type(layer) for layer in model.modules() if list(layer.parameters(recurse=False))}
        assert holders <= TRAINABLE
        assert not any(getattr(layer, "inplace", False) for layer in model.modules())
        assert all(layer.padding_mode == "zeros" for layer in model.modules() if isinstance(layer, nn.Conv2d))
        refuse_batch_norm(model)
        assert ModuleValidator.validate(model, strict=False) == []


@pytest.mark.filterwarnings("ignore:Full backward hook is firing:UserWarning")
@pytest.mark.parametrize("activation", ["tanh", "relu"])
@pytest.mark.parametrize("name", each_model(series=False))
def test_hooks_give_the_gradient_of_each_record_alone(name, activation):
    rows, size = (2, 16) if MODELS[name].deep else (5, 28)
    if MODELS[name].deep and activation == "tanh" and not name.startswith("vgg"):
        pytest.skip("ReLU whatever is asked")
    batch, targets = images(rows, image_size=size), torch.arange(rows) % 3
    model = build(name, image_size=size, activation=activation)
    if MODELS[name].deep:
        model, batch = model.double(), batch.double()  # float32 rounds near ties to either side
    oracle = []
    for row in range(rows):
        loss = nn.functional.cross_entropy(model(batch[row : row + 1]), targets[row : row + 1])
        oracle.append(torch.autograd.grad(loss, list(model.parameters())))
    hooked = GradSampleModule(model, loss_reduction="sum")
    nn.functional.cross_entropy(hooked(batch), targets, reduction="sum").backward()
    for index, (key, parameter) in enumerate(hooked.named_parameters()):
        expected = torch.stack([gradients[index] for gradients in oracle])
        torch.testing.assert_close(
            parameter.grad_sample, expected, rtol=1e-4, atol=1e-6, msg=lambda said, key=key: f"{key}: {said}"
        )


@pytest.mark.parametrize("name", SHALLOW)
@pytest.mark.parametrize("image_size", [33, 57])
def test_gradients_are_the_same_bits_again(name, image_size):
    gradients = []
    for _ in range(2):
        model = build(name, image_size=image_size)
        model(images(3, image_size=image_size)).square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(first, second) for first, second in zip(*gradients, strict=True))


@pytest.mark.parametrize(
    "norm",
    [
        nn.BatchNorm2d(8),
        nn.BatchNorm2d(8, affine=False),
        nn.BatchNorm2d(8, track_running_stats=False),
        nn.BatchNorm2d(8).requires_grad_(False).eval(),
        nn.SyncBatchNorm(8),
        nn.LazyBatchNorm2d(),
        nn.InstanceNorm2d(8, track_running_stats=True),
    ],
)
def test_batch_norm_is_refused_by_the_layers_name(norm):
    inner = nn.Sequential(nn.Conv2d(1, 8, 3), norm)
    with pytest.raises(BatchNormError, match=rf"block\.1 \({type(norm).__name__}\)"):
        refuse_batch_norm(_Named(inner))


class _Named(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block


def test_every_batch_norm_is_named_and_a_bare_one_too():
    with pytest.raises(BatchNormError, match=r"0 \(BatchNorm2d\), 2 \(BatchNorm1d\)"):
        refuse_batch_norm(nn.Sequential(nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(3)))
    with pytest.raises(BatchNormError, match="the model itself"):
        refuse_batch_norm(nn.BatchNorm2d(3))


def test_norms_that_keep_records_apart_are_accepted():
    refuse_batch_norm(nn.Sequential(nn.GroupNorm(2, 8), nn.LayerNorm(4), nn.InstanceNorm2d(8)))


@pytest.mark.parametrize(
    ("channels", "groups"), [(4, 1), (8, 2), (16, 4), (32, 8), (48, 8), (512, 8), (20, 5)]
)
def test_groups_have_several_channels(channels, groups):
    assert group_norm(channels).num_groups == groups


@pytest.mark.parametrize("grid", [1, 2, 3, 4, 7])
def test_grid_pool_covers_every_pixel_with_the_asked_cells(grid):
    for side in range(grid, 40):
        pixels = torch.zeros(1, 1, side, side, requires_grad=True)
        cells = grid_pool(side, grid=grid)(pixels)
        assert cells.shape == (1, 1, grid, grid)
        cells.sum().backward()
        assert (pixels.grad > 0).all()
    with pytest.raises(ValueError, match="cells"):
        grid_pool(grid - 1, grid=grid)


def test_grid_pool_is_adaptive_pooling_where_cells_divide_the_map():
    maps = torch.randn(2, 3, 12, 12)
    torch.testing.assert_close(grid_pool(12, grid=4)(maps), nn.functional.adaptive_avg_pool2d(maps, 4))
