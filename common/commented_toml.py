"""A configuration as TOML with a comment above each key: its meaning and unit, its default, its limits."""

import textwrap
from collections.abc import Container, Iterator
from typing import Any, Literal, get_args, get_origin

import tomli_w
from pydantic.fields import FieldInfo

from common.settings import Section, meaning, to_nested

_WIDTH = 100


def to_commented_toml(config: Section, *, head: str, without: Container[str] = ()) -> str:
    """TOML text that `common.settings.load` reads back; keys in `without` (`section.key`) are left out."""
    lines = [_comment(head)]
    values = to_nested(config)
    for name in type(config).model_fields:
        section = getattr(config, name)
        table = name.replace("_", "-")
        lines.append(f"\n\n[{table}]")
        lines.append(_comment(_first_paragraph(type(section).__doc__ or meaning(type(config), name))))
        for key, field in type(section).model_fields.items():
            kebab = key.replace("_", "-")
            if f"{table}.{kebab}" not in without:
                text = meaning(type(section), key)
                lines.append("\n" + _setting(kebab, values[table].get(kebab), field, text))
    return "\n".join(lines) + "\n"


def _setting(key: str, value: Any, field: FieldInfo, text: str) -> str:
    remarks = [" ".join(text.split()), *_limits(field)]
    comment = _comment(" ".join(filter(None, remarks)))
    return f"{comment}\n" + (f"# {key} =" if value is None else f"{key} = {_toml_value(value)}")


def _limits(field: FieldInfo) -> Iterator[str]:
    choices = get_args(field.annotation) if get_origin(field.annotation) is Literal else ()
    if len(choices) > 1:
        yield f"One of {', '.join(str(choice) for choice in choices)}."
    if not field.is_required() and field.default not in ("", None, ()):
        yield f"Default: {_toml_value(field.default)}."


def _toml_value(value: Any) -> str:
    """One value on one line."""
    if isinstance(value, list | tuple):
        return f"[{', '.join(_toml_value(item) for item in value)}]"
    return tomli_w.dumps({"k": value})[4:].strip()


def _first_paragraph(text: str) -> str:
    return " ".join(text.strip().split("\n\n")[0].split())


def _comment(text: str) -> str:
    lines = [part for line in text.splitlines() for part in textwrap.wrap(line, _WIDTH) or [""]]
    return "\n".join(f"# {line}".rstrip() for line in lines)
