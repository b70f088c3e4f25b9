"""A network whose outputs a heat map can explain class by class, whatever the task."""

import torch
from torch import Tensor, nn

from common.task_kinds import MULTI_LABEL, ORDINAL
from common.tasks import Task


class ScoreOfEach(nn.Module):
    """The network of a task with one score per class, each of which means something by itself.

    Findings are their own logits. A level's score is the log odds of being reached, the lowest level's those
    of not being left.
    """

    def __init__(self, network: nn.Module, task: str) -> None:
        super().__init__()
        self.network = network
        self._task = task

    def forward(self, inputs: Tensor) -> Tensor:
        """(rows, classes)."""
        outputs: Tensor = self.network(inputs)
        if self._task != ORDINAL:
            return outputs
        steps = torch.nn.functional.softplus(outputs[:, 1:])
        beyond = torch.cat([outputs[:, :1], -steps], dim=1).cumsum(dim=1)
        return torch.cat([-beyond[:, :1], beyond], dim=1)


def stands_alone(task: Task) -> bool:
    """Whether a class is explained by its own score, not by how much it exceeds the others."""
    return task.name in (MULTI_LABEL, ORDINAL)
