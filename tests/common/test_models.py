"""The registry: which networks there are, their sizes, shapes and weights."""

import itertools
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from common.errors import ConfigError, ModelError
from common.models.initial import main
from common.models.names import MODELS
from common.models.private_layers import group_norm
from common.models.registry import (
    build_model,
    initial_parameters,
    load_parameters,
    model_names,
    parameter_template,
    read_parameters,
)
from common.settings import to_nested
from tests.model_names import DEEP, FIRST_OF_FAMILY, OF_SERIES, SHALLOW, shape_of, spec_of

ROOT = Path(__file__).resolve().parents[2]
NETWORKS = [name for name in SHALLOW if name not in ("softmax", "scattering")]
"""Those with activations."""


def count(spec):
    return sum(math.prod(shape) for shape in parameter_template(spec).values())


def run_python(*arguments):
    return subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True, check=False)


def test_names_are_those_of_the_design():
    shallow = ("softmax", "cnn1", "cnn2", "cnn", "cnn-small", "cnn-flatten", "scattering")
    deep = ("mobilenet-v2", "densenet121", "vgg11", "vgg13", "vgg16", "resnet18", "resnet34", "resnet50")
    series = ("last-image", "rnn", "gru", "lstm")
    assert model_names() == shallow + series + deep
    assert (shallow, series, deep) == (SHALLOW, OF_SERIES, DEEP)


def test_names_need_no_torch():
    code = "import sys, common.models.names as n; n.model_names(); assert 'torch' not in sys.modules"
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("num_outputs", [2, 3, 10])
def test_cnn_small_has_at_most_20000_parameters_at_any_image_size(channels, num_outputs):
    sizes = {
        count(spec_of("cnn-small", channels=channels, num_outputs=num_outputs, image_size=image_size))
        for image_size in (28, 33, 64, 150, 224, 512)
    }
    assert len(sizes) == 1
    assert max(sizes) <= 20_000


@pytest.mark.parametrize("name", ["cnn1", "cnn2", "cnn"])
def test_networks_read_on_a_grid_do_not_grow_with_the_image(name):
    templates = [parameter_template(spec_of(name, image_size=size)) for size in (28, 45, 64, 150, 512)]
    assert all(template == templates[0] for template in templates)


def test_parameter_counts_by_hand():
    assert count(spec_of("softmax", channels=3, num_outputs=4)) == 3 * 28 * 28 * 4 + 4
    norms, convolutions = 2 * (32 + 64 + 128), (9 + 1) * 32 + (9 * 32 + 1) * 64 + (9 * 64 + 1) * 128
    assert count(spec_of("cnn")) == convolutions + norms + 9 * 128 * 2 + 2
    assert count(spec_of("cnn-flatten")) == convolutions + norms + (9 * 128 + 1) * 512 + 512 * 2 + 2
    assert count(spec_of("cnn-flatten", image_size=224)) > 50_000_000


@pytest.mark.parametrize("name", ["mobilenet-v2", "densenet121", "resnet18", "resnet34", "resnet50"])
def test_parameters_are_those_of_torchvision(name):
    with torch.device("meta"):
        theirs = torchvision_model(name, num_classes=5)
    shapes = [tuple(parameter.shape) for parameter in theirs.parameters()]
    ours = parameter_template(spec_of(name, channels=3, image_size=224, num_outputs=5))
    assert list(ours.values()) == shapes
    if not name.startswith("mobilenet"):  # its output layer stands behind a dropout there
        assert list(ours) == [name for name, _ in theirs.named_parameters()]


@pytest.mark.parametrize("name", ["vgg11", "vgg13", "vgg16"])
def test_parameters_of_the_convolutions_are_those_of_torchvision(name):
    with torch.device("meta"):
        theirs = torchvision_model(f"{name}_bn", num_classes=5).features
    shapes = [tuple(parameter.shape) for parameter in theirs.parameters()]
    ours = list(parameter_template(spec_of(name, channels=3, image_size=224, num_outputs=5)).values())
    assert ours == [*shapes, (5, 512), (5,)]


@pytest.mark.parametrize("name", ["mobilenet-v2", "densenet121", "resnet18", "resnet50"])
def test_deep_models_compute_what_torchvision_computes(name):
    theirs = torchvision_model(name, num_classes=2)
    for layer in list(theirs.modules()):
        for key, child in layer.named_children():
            if isinstance(child, torch.nn.BatchNorm2d):
                setattr(layer, key, group_norm(child.num_features))
    theirs.eval()  # for the dropout of MobileNetV2
    ours = build_model(spec_of(name, channels=3, image_size=64))
    weights = dict(
        zip(parameter_template(spec_of(name, channels=3, image_size=64)), theirs.parameters(), strict=True)
    )
    load_parameters(ours, {key: value.detach().numpy() for key, value in weights.items()})
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(ours(images), theirs(images), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DEEP)
def test_the_number_of_parameters_does_not_grow_with_the_image(name):
    small, large = (count(spec_of(name, image_size=size)) for size in (28, 64))
    # Only the first kernel of some is wider for large images.
    assert large - small in (0, (49 - 9) * 64)
    assert f"{large / 1e6:.2g}" in MODELS[name].summary


@pytest.mark.parametrize("name", model_names())
def test_the_guide_knows_every_model(name):
    rows = (ROOT / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    _, _, minimum, *weights, _, _ = next(row for row in rows if row.startswith(f"| {name} |")).split("|")
    assert int(minimum) == MODELS[name].minimum_image_size
    found = [int(number.replace(",", "")) for number in weights]
    assert found == [count(spec_of(name, image_size=size)) for size in (28, 64)]


def torchvision_model(name, **options):
    from torchvision import models

    return getattr(models, name.replace("-", "_"))(**options)


@pytest.mark.parametrize("image_size", [28, 33, 64, 150])
@pytest.mark.parametrize("name", SHALLOW)
def test_forward_shape(name, image_size):
    for channels, num_outputs in itertools.product((1, 3), (2, 7)):
        if name == "cnn-flatten" and image_size == 150 and (channels, num_outputs) != (1, 2):
            continue  # 85 MB of weights each: once is enough
        model = build_model(spec_of(name, channels=channels, image_size=image_size, num_outputs=num_outputs))
        outputs = model(torch.zeros(2, channels, image_size, image_size))
        assert outputs.shape == (2, num_outputs)
        assert torch.isfinite(outputs).all()


@pytest.mark.parametrize(("image_size", "channels"), [(28, 1), (65, 3)])
@pytest.mark.parametrize("name", DEEP)
def test_forward_shape_of_deep_models(name, image_size, channels):
    with torch.device("meta"):
        model = build_model(spec_of(name, image_size=image_size, channels=channels, num_outputs=3))
        assert model(torch.zeros(2, channels, image_size, image_size)).shape == (2, 3)


@pytest.mark.parametrize("name", model_names())
def test_every_size_up_to_512_has_consistent_layers(name):
    odd_and_even = (28, 29, 31, 32, 33, 47, 63, 64, 65, 127, 150, 224, 333, 511, 512)
    for image_size in odd_and_even if name in SHALLOW else (31, 63, 65):
        spec = spec_of(name, image_size=image_size)
        with torch.device("meta"):
            assert build_model(spec)(torch.zeros(1, *shape_of(spec))).shape == (1, 2)


@pytest.mark.parametrize("name", model_names())
def test_the_stated_minimum_image_size_is_the_real_one(name):
    minimum = MODELS[name].minimum_image_size
    spec = spec_of(name, image_size=minimum)
    with torch.device("meta"):
        assert build_model(spec)(torch.zeros(1, *shape_of(spec))).shape == (1, 2)
    if minimum > 8:  # ModelSpec itself refuses less than 8
        with pytest.raises(ModelError, match=f"{minimum - 1} px are too small for {name}"):
            build_model(spec_of(name, image_size=minimum - 1))


def test_unknown_name_lists_the_names():
    with pytest.raises(ModelError) as caught:
        build_model(spec_of("cnn-smal"))
    assert all(name in str(caught.value) for name in model_names())


@pytest.mark.parametrize("name", [*NETWORKS, "vgg11"])
def test_activation_is_the_asked_one(name):
    kinds = {
        activation: {type(layer) for layer in build_model(spec_of(name, activation=activation)).modules()}
        for activation in ("tanh", "relu")
    }
    assert torch.nn.Tanh in kinds["tanh"]
    assert torch.nn.ReLU not in kinds["tanh"]
    assert torch.nn.ReLU in kinds["relu"]
    assert torch.nn.Tanh not in kinds["relu"]


def test_template_allocates_nothing():
    spec = spec_of("cnn-flatten", image_size=512)
    code = (
        "import resource; from common.config import ModelSpec; from common.models.registry import *;"
        f"spec = ModelSpec.model_validate({to_nested(spec)!r});"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss;"
        "template = parameter_template(spec);"
        "assert template['hidden.weight'] == (512, 128 * 64 * 64), template;"
        "grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before;"
        "assert grown < 100_000, grown"
    )
    done = run_python("-c", code)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", ["cnn-small", *FIRST_OF_FAMILY])
def test_template_is_that_of_the_built_model(name):
    spec = spec_of(name, channels=3, num_outputs=4)
    parameters = initial_parameters(spec, 0)
    assert list(parameter_template(spec).items()) == [(key, value.shape) for key, value in parameters.items()]
    assert {value.dtype for value in parameters.values()} == {np.dtype(np.float32)}


@pytest.mark.parametrize("name", ["cnn-small", *FIRST_OF_FAMILY])
def test_initial_parameters_depend_on_the_seed_only(name):
    spec = spec_of(name)
    torch.manual_seed(5)
    first = initial_parameters(spec, 1)
    torch.manual_seed(6)
    again, other = initial_parameters(spec, 1), initial_parameters(spec, 2)
    assert all(np.array_equal(first[key], again[key]) for key in first)
    assert any(not np.array_equal(first[key], other[key]) for key in first)


def test_initial_parameters_leave_the_global_random_state():
    torch.manual_seed(7)
    expected = torch.rand(3)
    torch.manual_seed(7)
    initial_parameters(spec_of("cnn"), 1)
    assert torch.equal(torch.rand(3), expected)


def test_a_process_of_its_own_writes_the_same_bits(tmp_path):
    spec, path = spec_of("cnn-small", channels=3), tmp_path / "new folder" / "initial.safetensors"
    arguments = ("--spec", json.dumps(to_nested(spec)), "--seed", "11", "--out", str(path))
    done = run_python("-m", "common.models.initial", *arguments)
    assert done.returncode == 0, done.stderr
    written, expected = load_file(path), initial_parameters(spec, 11)
    assert written.keys() == expected.keys()
    assert all(np.array_equal(written[key], expected[key]) for key in expected)
    assert [entry.name for entry in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{", "--spec is not JSON"),
        ('{"name": "cnn"}', "channels"),
        ('{"name": "vgg", "channels": 1, "image-size": 28, "num-outputs": 2}', "there is no model 'vgg'"),
    ],
)
def test_the_command_says_what_is_wrong_and_writes_nothing(text, said, tmp_path, capsys):
    path = tmp_path / "initial.safetensors"
    assert main(["--spec", text, "--seed", "1", "--out", str(path)]) == 2
    assert said in capsys.readouterr().err
    assert not path.exists()


def test_load_and_read_are_inverse_and_copies():
    model = build_model(spec_of("cnn2"))
    parameters = initial_parameters(spec_of("cnn2"), 3)
    for array in parameters.values():
        array.flags.writeable = False  # as arrays that come from a message
    load_parameters(model, parameters)
    read = read_parameters(model)
    assert all(np.array_equal(read[key], parameters[key]) for key in parameters)
    with torch.no_grad():
        next(model.parameters()).add_(1)
    assert all(np.array_equal(read[key], parameters[key]) for key in parameters)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda weights: weights.pop("output.bias"),
        lambda weights: weights.update(extra=np.zeros(1, np.float32)),
        lambda weights: weights.update({"output.bias": np.zeros(3, np.float32)}),
        lambda weights: weights.update({"output.bias": np.zeros((2, 1), np.float32)}),
        lambda weights: weights.update({"output.bias": np.zeros(2, np.float64)}),
    ],
)
def test_foreign_weights_are_refused_and_change_nothing(spoil):
    model = build_model(spec_of("cnn1"))
    before, weights = read_parameters(model), initial_parameters(spec_of("cnn1"), 3)
    spoil(weights)
    with pytest.raises(ModelError):
        load_parameters(model, weights)
    after = read_parameters(model)
    assert all(np.array_equal(before[key], after[key]) for key in before)


def test_a_broken_spec_is_a_config_error():
    from common.models.initial import _read_spec

    with pytest.raises(ConfigError):
        _read_spec("[1]")
