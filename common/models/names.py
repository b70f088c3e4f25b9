"""Names of the models and what a person should know before choosing one (imports no torch)."""

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType


@dataclass(frozen=True, kw_only=True)
class KnownModel:
    """A model of the registry."""

    summary: str
    """One line for help texts."""
    minimum_image_size: int
    """Smallest side of the square image in pixels that leaves every layer something to look at."""
    settings: tuple[str, ...] = ()
    """`section.key=value` that it needs under privacy in place of the usual ones (docs/defaults.md)."""
    deep: bool = False
    """Millions of weights in many layers: asks for smaller steps without privacy, and for patience."""
    series: bool = False
    """Takes series of images (`ModelSpec.steps` above 1); the others take single images."""


def _deep(summary: str, *, minimum: int = 8) -> KnownModel:
    return KnownModel(summary=summary, minimum_image_size=minimum, deep=True)


_SERIES_SETTINGS = (
    # Fewer rounds and larger steps than for single images, chosen on generated visits (docs/series.md).
    "federation.rounds=40",
    "training.learning-rate=0.7",
)


def _of_series(summary: str) -> KnownModel:
    return KnownModel(summary=summary, minimum_image_size=17, settings=_SERIES_SETTINGS, series=True)


MODELS: Mapping[str, KnownModel] = MappingProxyType(
    {
        "softmax": KnownModel(summary="logistic regression on the pixels", minimum_image_size=8),
        "cnn1": KnownModel(summary="one convolution", minimum_image_size=14),
        "cnn2": KnownModel(summary="two convolutions", minimum_image_size=16),
        "cnn": KnownModel(summary="three blocks 32/64/128, 95,000 parameters", minimum_image_size=24),
        "cnn-small": KnownModel(
            summary="three strided convolutions, under 20,000 parameters", minimum_image_size=17
        ),
        "cnn-flatten": KnownModel(
            summary="blocks 32/64/128, 512 hidden units: grows with the image",
            minimum_image_size=8,
        ),
        "scattering": KnownModel(
            summary="fixed wavelet features, linear: the most accurate under strong privacy",
            minimum_image_size=16,
            settings=(
                # One noised sum over all patients in each round: a convex loss wants many small steps.
                "privacy.sampling-rate=1.0",
                "privacy.local-steps=1",
                "privacy.l2-clip-norm=0.2",
                "training.optimizer=sgd",
                "training.learning-rate=4.0",
                "server.optimizer=momentum",
                "server.momentum=0.9",
            ),
        ),
        "last-image": _of_series("the newest image of a series alone: what a series must beat"),
        "rnn": _of_series("series of images: encoder of cnn-small, tanh recurrence"),
        "gru": _of_series("series of images: encoder of cnn-small, GRU"),
        "lstm": _of_series("series of images: encoder of cnn-small, LSTM"),
        "mobilenet-v2": _deep("MobileNetV2 with GroupNorm, 2.2 million weights"),
        "densenet121": _deep("DenseNet-121 with GroupNorm, 6.9 million weights"),
        "vgg11": _deep("VGG-11 with GroupNorm, averaged at its end, 9.2 million weights", minimum=16),
        "vgg13": _deep("VGG-13, likewise, 9.4 million weights", minimum=16),
        "vgg16": _deep("VGG-16, likewise, 15 million weights", minimum=16),
        "resnet18": _deep("ResNet-18 with GroupNorm, 11 million weights"),
        "resnet34": _deep("ResNet-34 with GroupNorm, 21 million weights"),
        "resnet50": _deep("ResNet-50 with GroupNorm, 24 million weights"),
    }
)


def model_names() -> tuple[str, ...]:
    """Every name that `build_model` knows, smallest idea first."""
    return tuple(MODELS)


def steps_problem(name: str, steps: int) -> str | None:
    """What is wrong with a model of the registry for series of so many steps (1: single images), or None."""
    if MODELS[name].series and steps == 1:
        return f"the model {name} is for series of images, and the plan has single images"
    if steps > 1 and not MODELS[name].series:
        fitting = ", ".join(other for other, known in MODELS.items() if known.series)
        return f"the model {name} is for single images, and the plan has series: choose one of {fitting}"
    return None
