"""Attacks that rebuild one image from one update, and how much the result looks like the image.

The attacker knows what everybody in a federation knows: the model, the weights that were sent out, the
learning rate, the plan's clip and noise, and public images of the same kind. Of the victim there is only the
update. `linear_leak` is exact for a model that begins with a linear layer; `match_gradients` is the attack of
Geiping et al., Inverting Gradients, arXiv 2003.14053; `most_probable` is an attacker who models noise and
clip.
Images are float64 (side, side), 0 black to 1 white.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from common.preprocessing import CENTRE, SPREAD
from common.tasks import Task

Image = npt.NDArray[np.float64]

_WINDOW = 7
_DARK, _FLAT = 0.01**2, 0.03**2
"""Constants of structural similarity for images from 0 to 1."""
_SMOOTHNESS = 0.01
"""Weight of the total variation beside one minus the cosine."""
_STEP = 0.1
_LEAST_NOISE = 1e-3
"""Share of the gradient's norm that is taken for rounding and misfit where there is no noise."""
_COMPONENTS = 100


@dataclass(frozen=True, kw_only=True)
class Seen:
    """What an attacker holds: the gradient that the update implies, and what is public."""

    model: nn.Module
    """With the weights that were sent out."""
    task: Task
    gradient: tuple[Tensor, ...]
    """(old weights - new weights) / learning rate, one tensor per parameter."""
    l2_clip_norm: float | None
    """C, where the attacker knows that the gradient was clipped."""
    noise_stddev: float
    """Noise on each number of the gradient, as the attacker knows it; 0 for none."""


@dataclass(frozen=True, kw_only=True)
class PublicImages:
    """What images of this kind look like: a mean and the directions in which they differ."""

    mean: Image
    directions: npt.NDArray[np.float64]
    """(components, side * side): principal components, each as long as its standard deviation."""

    @classmethod
    def of(cls, images: npt.NDArray[np.float64]) -> "PublicImages":
        """Learn from images (rows, side, side)."""
        mean = images.mean(axis=0)
        centred = (images - mean).reshape(len(images), -1)
        _, lengths, directions = np.linalg.svd(centred, full_matrices=False)
        kept = slice(0, min(_COMPONENTS, len(images) - 1))
        return cls(mean=mean, directions=lengths[kept, None] * directions[kept] / np.sqrt(len(images) - 1))


def similarity(first: Image, second: Image) -> float:
    """Structural similarity, 1 for equal images, about 0 for unrelated ones.

    Mean over all 7 x 7 windows. Source: Wang et al., Image Quality Assessment, IEEE TIP 13(4), 2004, eq. 13.

    >>> similarity(np.eye(9), np.eye(9))
    1.0
    """
    windows = [
        np.lib.stride_tricks.sliding_window_view(image.astype(np.float64), (_WINDOW, _WINDOW))
        for image in (first, second)
    ]
    mean, other_mean = (w.mean(axis=(-1, -2)) for w in windows)
    sample = _WINDOW**2 / (_WINDOW**2 - 1)
    variance, other_variance = (sample * w.var(axis=(-1, -2)) for w in windows)
    covariance = sample * ((windows[0] * windows[1]).mean(axis=(-1, -2)) - mean * other_mean)
    brightness = (2 * mean * other_mean + _DARK) / (mean**2 + other_mean**2 + _DARK)
    structure = (2 * covariance + _FLAT) / (variance + other_variance + _FLAT)
    return float((brightness * structure).mean())


def linear_leak(seen: Seen, *, side: int) -> Image:
    """Divide the first layer's weight gradient by its bias gradient: the input itself, for one record.

    With a linear first layer dL/dW = (dL/db) x^T, so every row of the one over the entry of the other is x,
    whatever the clip scaled both with. The row with the largest bias gradient is the least noisy one.
    """
    weight, bias = seen.gradient[0], seen.gradient[1]
    row = int(bias.abs().argmax())
    return _picture((weight[row] / bias[row]).view(side, side))


def match_gradients(seen: Seen, *, side: int, iterations: int, restarts: int, seed: int) -> Image:
    """Find the image whose gradient points the way of the seen one: cosine and total variation, signed Adam.

    Every label and every start is tried; the attacker keeps the one with the best objective.
    """
    found: list[tuple[float, Image]] = []
    for label in _plausible_labels(seen):
        for restart in range(restarts):
            generator = torch.Generator().manual_seed(seed + restart)
            guess = torch.randn(1, 1, side, side, generator=generator).requires_grad_(True)
            objective = torch.tensor(0.0)
            optimizer = torch.optim.Adam([guess], lr=_STEP)
            schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
            for _ in range(iterations):
                gradient = _gradient(seen, guess, label)
                objective = 1 - _cosine(gradient, seen.gradient) + _SMOOTHNESS * _total_variation(guess)
                guess.grad = torch.autograd.grad(objective, guess)[0].sign()
                optimizer.step()
                schedule.step()
                guess.data.clamp_(-CENTRE / SPREAD, CENTRE / SPREAD)
            found.append((float(objective.detach()), _picture(guess.detach().view(side, side))))
    return min(found, key=lambda pair: pair[0])[1]


def most_probable(seen: Seen, public: PublicImages, *, iterations: int) -> Image:
    """Find the most probable image given the update: Gaussian noise of known size, clip, Gaussian prior.

    The prior is that of the public images, so that without any evidence the answer is their mean. The
    attacker does not take the clip on trust: every label with and without it is a hypothesis, and the most
    probable image of them all is the answer.
    """
    clips = {seen.l2_clip_norm, None}
    found = [
        _most_probable(seen, public, label=label, l2_clip_norm=clip, iterations=iterations)
        for label in _plausible_labels(seen)
        for clip in clips
    ]
    return min(found, key=lambda pair: pair[0])[1]


def _most_probable(
    seen: Seen, public: PublicImages, *, label: int, l2_clip_norm: float | None, iterations: int
) -> tuple[float, Image]:
    """Return how improbable the best image of this hypothesis is (nats, up to a constant), and the image."""
    side = public.mean.shape[0]
    mean = torch.from_numpy(public.mean).float()
    directions = torch.from_numpy(public.directions).float()
    stddev = max(seen.noise_stddev, _LEAST_NOISE * float(_norm(seen.gradient)))
    scores = torch.zeros(len(directions), requires_grad=True)
    objective = torch.tensor(0.0)
    optimizer = torch.optim.Adam([scores], lr=_STEP)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, iterations)
    for _ in range(iterations):
        image = mean + (scores @ directions).view(side, side)
        gradient = _gradient(seen, ((image - CENTRE) / SPREAD)[None, None], label)
        factor: Tensor | float = 1.0
        if l2_clip_norm is not None:
            factor = (l2_clip_norm / _norm(gradient)).clamp(max=1)
        pairs = zip(gradient, seen.gradient, strict=True)
        misfit = torch.stack([(factor * a - b).square().sum() for a, b in pairs]).sum()
        objective = misfit / (2 * stddev**2) + scores.square().sum() / 2
        scores.grad = torch.autograd.grad(objective, scores)[0]
        optimizer.step()
        schedule.step()
    image = mean + (scores.detach() @ directions).view(side, side)
    return float(objective.detach()), np.clip(image.double().numpy(), 0, 1)


def _plausible_labels(seen: Seen) -> list[int]:
    """Try all of them where there is noise; without it the one negative bias gradient tells the label."""
    bias = seen.gradient[-1]
    return [int(bias.argmin())] if seen.noise_stddev == 0 else list(range(len(bias)))


def _gradient(seen: Seen, inputs: Tensor, label: int) -> tuple[Tensor, ...]:
    losses = seen.task.losses(seen.model(inputs), torch.tensor([label]))
    return torch.autograd.grad(losses.sum(), list(seen.model.parameters()), create_graph=True)


def _norm(gradient: Sequence[Tensor]) -> Tensor:
    return torch.stack([part.square().sum() for part in gradient]).sum().sqrt()


def _cosine(first: Sequence[Tensor], second: Sequence[Tensor]) -> Tensor:
    inner = torch.stack([(a * b).sum() for a, b in zip(first, second, strict=True)]).sum()
    return inner / (_norm(first) * _norm(second))


def _total_variation(inputs: Tensor) -> Tensor:
    down = inputs[..., 1:, :] - inputs[..., :-1, :]
    across = inputs[..., 1:] - inputs[..., :-1]
    return down.abs().mean() + across.abs().mean()


def _picture(standardised: Tensor) -> Image:
    return np.clip(standardised.double().numpy() * SPREAD + CENTRE, 0, 1)
