"""Layers in front of a model that never change: what they say of an image may be kept for a whole run."""

from collections import OrderedDict

from torch import nn


class FixedStage(nn.Module):
    """Layers without parameters that treat every row alone; the first layer of a model that has them."""

    width: int
    """Numbers that come out for each row: (rows, width)."""


def fixed_stage(model: nn.Module) -> FixedStage | None:
    """The stage that `model` begins with, None where all of it may train."""
    first = next(iter(model.children()), None)
    return first if isinstance(first, FixedStage) else None


def trained_stage(model: nn.Module) -> nn.Module:
    """What follows the fixed stage, the same layers by the same names; `model` itself where there is none.

    trained_stage(model)(fixed_stage(model)(images)) is model(images).
    """
    if fixed_stage(model) is None:
        return model
    return nn.Sequential(OrderedDict(list(model.named_children())[1:]))
