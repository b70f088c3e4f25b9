"""Layers for single images, applied to all images of all series at once."""

from torch import Tensor, nn


class OverSteps(nn.Module):
    """`layers` on every step of every record: (rows, steps, ...) to (rows, steps, ...).

    The layers see rows * steps inputs, those of one record one after the other; per-row gradients add up what
    belongs to a record (`steps_by_layer`).
    """

    def __init__(self, steps: int, layers: nn.Module) -> None:
        super().__init__()
        self.steps = steps
        self.layers = layers

    def extra_repr(self) -> str:
        """Part of the architecture's printed form."""
        return f"steps={self.steps}"

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the layers; raises ValueError for another number of steps than was said at the start."""
        if inputs.shape[1] != self.steps:
            raise ValueError(f"expected {self.steps} steps, got {inputs.shape[1]}")
        outputs: Tensor = self.layers(inputs.flatten(0, 1))
        return outputs.reshape(-1, self.steps, *outputs.shape[1:])


def steps_by_layer(model: nn.Module) -> dict[nn.Module, int]:
    """How many consecutive inputs of each layer belong to one record; 1 outside of `OverSteps`."""
    found = dict.fromkeys(model.modules(), 1)
    for over in model.modules():
        if isinstance(over, OverSteps):
            for layer in over.layers.modules():
                found[layer] *= over.steps
    return found
