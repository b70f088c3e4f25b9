"""Scattering features: Kymatio's values, a slow convolution by hand, and what whitening and norm promise."""

import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from common.config import ModelSpec
from common.models.fixed_stage import fixed_stage, trained_stage
from common.models.generated_images import generated_images
from common.models.registry import build_model, parameter_template
from common.models.scattering import CONSTANT, ScatteringFeatures, logarithms_of, statistics_of_noise
from common.models.wavelets import Scattering, wavelets, window_rows

ROOT = Path(__file__).resolve().parents[2]
SIDE = 16
KYMATIO_PI = 3.1415
"""Kymatio 0.3 divides its filters by 2 * 3.1415 * ...: each convolution is larger by this share."""


def spec_of(*, channels=1, image_size=SIDE, num_outputs=2):
    return ModelSpec(name="scattering", channels=channels, image_size=image_size, num_outputs=num_outputs)


def pattern(side):
    rows, columns = np.mgrid[:side, :side]
    return ((7 * rows + 3 * columns**2) % 29) / 29.0


def pictures(rows, *, side=SIDE, channels=1, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand((rows, channels, side, side), generator=generator) * 4 - 2


def place_of(path, *, scales=3, angles=8):
    """Channel of a path (), (j, l) or (j, l, coarser j, l)."""
    if not path:
        return 0
    if len(path) == 2:
        return 1 + angles * path[0] + path[1]
    pairs = [(fine, coarse) for fine in range(scales) for coarse in range(fine + 1, scales)]
    before = 1 + scales * angles + angles**2 * pairs.index((path[0], path[2]))
    return before + angles * path[1] + path[3]


# Kymatio 0.3.0, Scattering2D(J=3, shape=(28, 28), L=8, frontend="numpy") of `pattern(28)`: places 0, 4 and 5.
KYMATIO = {
    (): (0.4918972, 0.4731843, 0.4805595),
    (0, 0): (0.0567125, 0.0597356, 0.0667736),
    (0, 5): (0.0710890, 0.0813021, 0.0616393),
    (1, 2): (0.0546903, 0.0250019, 0.0410465),
    (2, 7): (0.0096987, 0.0082768, 0.0089974),
    (0, 0, 1, 0): (0.0058986, 0.0070310, 0.0066283),
    (0, 3, 1, 6): (0.0055632, 0.0036097, 0.0034406),
    (0, 7, 2, 1): (0.0017428, 0.0019095, 0.0010607),
    (1, 4, 2, 4): (0.0059280, 0.0013524, 0.0018274),
}


@pytest.mark.parametrize(("path", "expected"), KYMATIO.items())
def test_the_values_are_kymatios(path, expected):
    transform = Scattering(28, scales=3, angles=8, dtype=torch.float64)
    found = transform(torch.from_numpy(pattern(28))[None])[0, place_of(path)].flatten()[[0, 4, 5]]
    convolutions = 1 + len(path) // 2
    np.testing.assert_allclose(found * (math.pi / KYMATIO_PI) ** convolutions, expected, atol=1.5e-7)


@pytest.mark.parametrize(
    ("side", "scales", "channels", "grid"),
    [(28, 3, 217, 3), (28, 2, 81, 7), (32, 3, 217, 4), (16, 3, 217, 2)],
)
def test_shapes_are_kymatios(side, scales, channels, grid):
    transform = Scattering(side, scales=scales, angles=8)
    assert transform(torch.zeros(2, side, side)).shape == (2, channels, grid, grid)


def convolved(image, kernel):
    """Periodic convolution, term by term."""
    total = np.zeros(image.shape, dtype=np.complex128)
    for (down, right), weight in np.ndenumerate(kernel):
        total += weight * np.roll(image, (down, right), axis=(0, 1))
    return total


def morlet_in_space(side, *, scale, number, angles):
    """The wavelet written down as a function of pixels, three periods of the picture wide."""
    offsets = np.arange(side)[:, None] + side * np.arange(-3, 4)[None, :]
    down, right = np.meshgrid(offsets.ravel(), offsets.ravel(), indexing="ij")
    angle = (angles - angles // 2 - 1 - number) * math.pi / angles
    along = down * math.cos(angle) + right * math.sin(angle)
    across = right * math.cos(angle) - down * math.sin(angle)
    spread, slant = 0.8 * 2**scale, 4 / angles
    hump = np.exp(-(along**2 + slant**2 * across**2) / (2 * spread**2)) * slant / (2 * math.pi * spread**2)
    wave = hump * np.exp(1j * 3 * math.pi / 4 / 2**scale * along)
    wavelet = wave - hump * wave.sum() / hump.sum()
    return wavelet.reshape(side, 7, side, 7).sum(axis=(1, 3))


def test_first_order_by_convolution_in_space():
    side, scales, angles = 16, 2, 4
    transform = Scattering(side, scales=scales, angles=angles, dtype=torch.float64)
    padded = np.pad(pattern(side), 4, mode="reflect")
    found = transform(torch.from_numpy(pattern(side))[None])[0].numpy()
    window = np.outer(*2 * [window_rows(len(padded), scales=scales)[0]])
    for number in range(angles):
        wavelet = morlet_in_space(len(padded), scale=0, number=number, angles=angles)
        modulus = np.abs(convolved(padded, wavelet))
        expected = convolved(modulus, window).real[4:-4:4, 4:-4:4]
        np.testing.assert_allclose(found[1 + number], expected, atol=1e-10)


def test_wavelets_keep_no_mean_and_hardly_raise_energy():
    side = 40
    bank = [wavelets(side, scale=scale, angles=8) for scale in range(3)]
    assert max(float(np.abs(filters[:, 0, 0]).max()) for filters in bank) < 1e-15
    # Littlewood-Paley: energy of a real picture over all bands, window included.
    low = np.fft.fft(window_rows(side, scales=3)[0]).real
    power = sum((filters**2).sum(axis=0) for filters in bank)
    mirrored = np.roll(power[::-1, ::-1], (1, 1), axis=(0, 1))
    total = np.outer(low, low) ** 2 + (power + mirrored) / 2
    assert total.max() < 1.3
    assert window_rows(side, scales=3)[0].sum() == pytest.approx(1)


def test_a_shift_by_the_step_moves_the_coefficients_and_small_ones_hardly_change_them():
    transform = Scattering(32, scales=3, angles=8, dtype=torch.float64)
    wide = torch.from_numpy(generated_images(1, 64))
    # Away from the border, whose mirror image differs.
    here, moved, nudged = (wide[:, at : at + 32, 16:48] for at in (16, 24, 17))
    first, later, near = (transform(each) for each in (here, moved, nudged))
    inside = first[:, :, 2, 1:3], later[:, :, 1, 1:3]
    assert float((inside[0] - inside[1]).norm() / inside[0].norm()) < 0.05
    assert float((near - first).norm() / first.norm()) < 0.1
    assert float((nudged - here).norm() / here.norm()) > 0.1


def test_generated_images_are_the_same_everywhere():
    images = generated_images(3, SIDE)
    assert images.shape == (3, SIDE, SIDE)
    assert images.min() >= 0
    assert images.max() <= 1
    # To the precision of Fourier transforms, which differ in last bits between machines.
    expected = (0.7404975569, 0.6767458923, 0.5790100841, 0.4842057048)
    np.testing.assert_allclose(images[0, 0, :4], expected, atol=1e-9)
    spectrum = np.abs(np.fft.fft2(generated_images(200, 32) - 0.5)).mean(axis=0)
    assert spectrum[0, 1] / spectrum[0, 8] == pytest.approx(8, rel=0.15)


def test_after_whitening_generated_images_are_alike_in_all_directions():
    statistics = statistics_of_noise(SIDE)
    transform = Scattering(SIDE, scales=3, angles=8)
    # Other pictures of the same kind than those that the statistics were formed of.
    fresh = torch.from_numpy(generated_images(500, SIDE)[250:]).float()
    standard = (logarithms_of(transform, fresh) - statistics.mean) * statistics.scale
    before, after = (torch.linalg.svdvals(each) for each in (standard, standard @ statistics.whitening))
    assert float(standard.mean().abs()) < 0.1
    assert float(standard.std()) == pytest.approx(1, abs=0.1)
    assert float(before[0] / before[20]) > 2 * float(after[0] / after[20])


@pytest.mark.parametrize(("channels", "image_size", "num_outputs"), [(1, 16, 2), (3, 28, 7), (1, 45, 3)])
def test_every_record_has_the_same_norm(channels, image_size, num_outputs):
    model = build_model(spec_of(channels=channels, image_size=image_size, num_outputs=num_outputs))
    images = pictures(3, side=image_size, channels=channels)
    images[1] = -2  # black
    images[2] *= 1e4
    features = fixed_stage(model)(images)
    assert features.shape == (3, channels * 1000 + 1)
    torch.testing.assert_close(features.norm(dim=1), torch.full((3,), math.sqrt(1 + CONSTANT**2)))
    assert model(images).shape == (3, num_outputs)
    assert list(parameter_template(spec_of(channels=channels))) == ["output.weight"]


def test_grey_images_in_colour_say_the_same():
    grey = pictures(2)
    features = ScatteringFeatures(channels=1, image_size=SIDE)(grey)[:, :-1]
    colour = ScatteringFeatures(channels=3, image_size=SIDE)(grey.expand(-1, 3, -1, -1))[:, :-1]
    torch.testing.assert_close(colour, features.repeat(1, 3) / math.sqrt(3), atol=1e-5, rtol=1e-4)


def test_the_stages_make_the_model():
    model = build_model(spec_of())
    torch.nn.init.normal_(model.output.weight)
    images, stage, rest = pictures(4), fixed_stage(model), trained_stage(model)
    assert torch.equal(rest(stage(images)), model(images))
    assert [name for name, _ in rest.named_parameters()] == ["output.weight"]
    assert rest.output.weight is model.output.weight
    assert not list(stage.parameters())
    plain = build_model(ModelSpec(name="cnn1", channels=1, image_size=SIDE, num_outputs=2))
    assert fixed_stage(plain) is None
    assert trained_stage(plain) is plain


def test_another_process_with_other_threads_finds_the_same_statistics():
    own = statistics_of_noise(SIDE)
    code = (
        "import sys, torch; torch.set_num_threads(2); from common.models.scattering import *;"
        f"s = statistics_of_noise({SIDE}); sys.stdout.buffer.write(s.whitening.numpy().tobytes())"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, timeout=60, check=True)
    theirs = np.frombuffer(done.stdout, np.float32).reshape(own.whitening.shape)
    largest = float(own.whitening.abs().max())
    np.testing.assert_allclose(theirs, own.whitening.numpy(), rtol=0, atol=1e-6 * largest)
