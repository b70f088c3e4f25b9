"""Settings in TOML: frozen typed sections, parsed once, refused with key, value and remedy.

TOML keys, flags and Flower's run config carry the same kebab-case names (`training.learning-rate`).
"""

import ast
import difflib
import functools
import inspect
import itertools
import json
import textwrap
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar, get_origin

import tomli_w
from pydantic import BaseModel, ConfigDict, ValidationError
from pydantic.fields import FieldInfo

from common.errors import ConfigError

Scalar = str | int | float | bool
S = TypeVar("S", bound="Section")


def _kebab(name: str) -> str:
    return name.replace("_", "-")


class Section(BaseModel):
    """A frozen group of settings; unknown keys are refused."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        alias_generator=_kebab,
        validate_by_name=True,
        validate_by_alias=True,
        allow_inf_nan=False,
    )


def meaning(kind: type[BaseModel], name: str) -> str:
    """The text under a field of a section; read from the source when asked, since no start needs it."""
    texts = (_texts_under_fields(base).get(name) for base in kind.__mro__ if issubclass(base, BaseModel))
    return next((text for text in texts if text), "")


@functools.cache
def _texts_under_fields(kind: type[BaseModel]) -> dict[str, str]:
    if kind.__module__.partition(".")[0] == "pydantic":
        return {}
    try:
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    except (OSError, TypeError, SyntaxError):  # installed without its source
        return {}
    lines = definition.body if isinstance(definition, ast.ClassDef) else []
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(lines)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(text, ast.Expr)
        and isinstance(text.value, ast.Constant)
        and isinstance(text.value.value, str)
    }


def parse(kind: type[S], values: Mapping[str, Any], *, source: str) -> S:
    """Build `kind` from nested values; raise ConfigError naming key, value and remedy."""
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        raise _explain(kind, error, source) from None


def load(kind: type[S], path: Path, overrides: Iterable[str] = ()) -> S:
    """Read a TOML file, apply `key=value` overrides, parse."""
    try:
        values = tomllib.loads(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"there is no file {path}", fix="name an existing TOML file") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML", why=str(error), fix="correct that line") from None
    return parse(kind, with_overrides(values, overrides), source=str(path))


def with_overrides(values: Mapping[str, Any], overrides: Iterable[str]) -> dict[str, Any]:
    """Return `values` with each `section.key=value` put in place; values are read as TOML, else as text."""
    result = json.loads(json.dumps(values))
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.strip():
            raise ConfigError(
                f"--set {override!r} is not key=value",
                fix="write for example --set training.learning-rate=0.1",
            )
        _put(result, key.strip().replace("_", "-"), _toml_value(text.strip()))
    return dict(result)


def to_flat(config: Section) -> dict[str, Scalar]:
    """Flatten to Flower's run config: dotted kebab-case keys, lists as JSON text."""
    flat: dict[str, Scalar] = {}
    for section, values in to_nested(config).items():
        for key, value in values.items():
            flat[f"{section}.{key}"] = json.dumps(value) if isinstance(value, list) else value
    return flat


def from_flat(kind: type[S], flat: Mapping[str, Any]) -> S:
    """Read Flower's run config, the inverse of `to_flat`; missing keys take their defaults."""
    lists = {key for key, field in _fields(kind) if get_origin(field.annotation) is tuple}
    nested: dict[str, Any] = {}
    for key, value in flat.items():
        _put(nested, key, _json_list(key, value) if key in lists and isinstance(value, str) else value)
    return parse(kind, nested, source="run config")


def to_nested(config: Section) -> dict[str, Any]:
    """Plain values under kebab-case keys, without unset ones."""
    return config.model_dump(mode="json", by_alias=True, exclude_none=True)


def to_toml(config: Section) -> str:
    """The configuration as TOML text that `load` reads back to an equal object."""
    return tomli_w.dumps(to_nested(config))


def _put(values: dict[str, Any], dotted: str, value: Any) -> None:
    *parents, last = dotted.split(".")
    for parent in parents:
        values = values.setdefault(parent, {})
        if not isinstance(values, dict):
            raise ConfigError(f"{dotted}: {parent} is not a section", fix="write section.key=value")
    values[last] = value


def _toml_value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def _json_list(key: str, text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        raise ConfigError(
            f"run config: {key} = {text[:80]!r} is not a list",
            why="lists travel as JSON text",
            fix='write for example ["normal", "pneumonia"]',
        ) from None


def _explain(kind: type[Section], error: ValidationError, source: str) -> ConfigError:
    first = error.errors()[0]
    key = ".".join(_kebab(str(part)) for part in first["loc"]) or "this combination of settings"
    known = sorted(key for key, _ in _fields(kind))
    if first["type"] == "extra_forbidden":
        near = difflib.get_close_matches(key, known, n=1, cutoff=0.4)
        fix = f"did you mean {near[0]}?" if near else f"known keys: {', '.join(known)}"
        return ConfigError(f"{source}: there is no setting {key}", why=f"value {first['input']!r}", fix=fix)
    message, says_what, instead = first["msg"].removeprefix("Value error, ").partition("; write ")
    meaning = _meaning(kind, [str(part) for part in first["loc"]])
    shown = "" if isinstance(first["input"], dict) else f" = {first['input']!r}"
    fix = f"write {instead}" if says_what else f"{key}: {meaning}" if meaning else ""
    return ConfigError(f"{source}: {key}{shown} cannot be used", why=message, fix=fix)


def _fields(kind: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, FieldInfo]]:
    """Every setting by its dotted key."""
    for name, field in kind.model_fields.items():
        key = prefix + _kebab(name)
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from _fields(field.annotation, f"{key}.")
        else:
            yield key, field


def _meaning(kind: type[BaseModel], location: list[str]) -> str:
    for depth, part in enumerate(location):
        field = kind.model_fields.get(part.replace("-", "_"))
        if field is None:
            return ""
        if (
            isinstance(field.annotation, type)
            and issubclass(field.annotation, BaseModel)
            and depth + 1 < len(location)
        ):
            kind = field.annotation
            continue
        return meaning(kind, part.replace("-", "_"))
    return ""
