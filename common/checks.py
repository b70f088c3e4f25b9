"""Checks before the first round: a table of check, result and what to do, and an exit code."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum

import typer

from common.command_line import OutputFormat, print_table


class CheckState(StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    """Worth knowing; also right as it is."""
    WARNING = "warning"
    FAILED = "failed"


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the table."""

    name: str
    state: CheckState
    result: str
    fix: str = ""
    """What to do; empty where nothing is to be done."""


def print_checks(checks: Sequence[Check], output: OutputFormat) -> None:
    """Print the table for people, or JSON for programs."""
    if output is OutputFormat.JSON:
        content = {"usable": exit_code(checks) == 0, "checks": [asdict(check) for check in checks]}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
        return
    rows = [(check.name, f"{check.state.value}: {check.result}", check.fix) for check in checks]
    print_table(("check", "result", "what to do"), rows)


def exit_code(checks: Sequence[Check], *, strict: bool = False) -> int:
    """0 when nothing failed (warnings included, unless `strict`), 1 otherwise."""
    bad = {CheckState.FAILED, CheckState.WARNING} if strict else {CheckState.FAILED}
    return int(any(check.state in bad for check in checks))
