"""Torch without its compiler until something asks for it: a third of the start-up of a worker process.

Torch's optimisers import `torch._dynamo`, 2000 modules, for two functions that do nothing where nothing is
being compiled. `install` puts a module in its place that has these two and becomes the real one as soon as
anything else of it is needed (`torch.compile`, for example).
"""

import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch

NAME = "torch._dynamo"


class _Stand(ModuleType):
    """Stands where `torch._dynamo` will be."""

    __file__ = __file__

    def graph_break(self, *_: Any, **__: Any) -> None:
        """Nothing is being traced, so there is nothing to break."""

    def disable(self, fn: Callable[..., Any] | None = None, *_: Any, **__: Any) -> Callable[..., Any]:
        """Nothing is being traced, so the function is as it is."""
        return fn if fn is not None else lambda function: function

    def __getattr__(self, name: str) -> Any:
        return getattr(real(), name)


def install() -> None:
    """Keep the compiler from being imported for nothing; does nothing where it has been."""
    if NAME not in sys.modules:
        sys.modules[NAME] = _Stand(NAME)
        setattr(torch, NAME.rpartition(".")[2], sys.modules[NAME])


def real() -> ModuleType:
    """Torch's own module, imported now where it was not."""
    if isinstance(sys.modules.get(NAME), _Stand):
        del sys.modules[NAME]
    return importlib.import_module(NAME)
