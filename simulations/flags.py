"""The scenario flags of `run`, `compare` and `sweep`, made from the fields of `Scenario`."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from common.settings import meaning
from simulations.scenario import Scenario, make_scenario

_METAVARS = {
    "private": "true|false",
    "engine": "embedded|ray|processes",
    "channels": "1|3",
    "data": "PATH",
    "path_root": "PATH",
    "out": "DIR",
    "set": "KEY=VALUE",
    "model": "NAME",
}
_SWITCHES = {"reproducible"}
_NUMBERS: dict[str, type[int] | type[float]] = {
    "image_size": int,
    "max_skipped_share": float,
    "channels": int,
    "hospitals": int,
    "rounds": int,
    "local_steps": int,
    "seed": int,
    "epsilon": float,
    "delta": float,
}


def takes_scenario(command: Callable[..., None]) -> Callable[..., None]:
    """Let a command with a first parameter `scenario: Scenario` take all scenario flags instead.

    Raises ConfigError, as `make_scenario` does, before the command is called.
    """

    @wraps(command)
    def with_flags(**given: Any) -> None:
        flags = {name: given.pop(name) for name in Scenario.model_fields}
        command(make_scenario({name: _plain(value) for name, value in flags.items()}), **given)

    own = list(inspect.signature(command).parameters.values())[1:]
    flags = [_parameter(name) for name in Scenario.model_fields]
    parameters = [*flags, *(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY) for parameter in own)]
    with_flags.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    with_flags.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return with_flags


def _parameter(name: str) -> inspect.Parameter:
    help_text = meaning(Scenario, name)
    flag = "--" + name.replace("_", "-")
    annotation: Any
    default: Any = None
    if name in _SWITCHES:
        annotation, default = Annotated[bool, typer.Option(flag, help=help_text)], False
    elif name == "set":
        annotation = Annotated[list[str] | None, typer.Option(flag, metavar=_METAVARS[name], help=help_text)]
    else:
        kind: Any = _NUMBERS.get(name, str)
        annotation = Annotated[
            kind | None, typer.Option(flag, metavar=_METAVARS.get(name), help=help_text, show_default=False)
        ]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _plain(value: Any) -> Any:
    """Lists as tuples; an empty one, like None, means that the flag was not given."""
    return tuple(value) or None if isinstance(value, list) else value
