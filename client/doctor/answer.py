"""How the doctor's findings are printed: a table, JSON, or the files of one finding; and the progress bar."""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from threading import Lock

import typer

from client.doctor.checkup import Checkup
from client.doctor.examination import Watch
from client.doctor.findings import Finding
from common.checks import exit_code, print_checks
from common.command_line import OutputFormat
from common.errors import ConfigError


def print_findings(checkup: Checkup, output: OutputFormat, *, strict: bool) -> int:
    """Print all findings; the files of each in JSON only. Returns the exit code."""
    findings = checkup.findings()
    checks = [finding.check for finding in findings]
    code = exit_code(checks, strict=strict)
    if output is OutputFormat.JSON:
        rows = [
            {
                "check": finding.name,
                "severity": finding.severity.value,
                "result": finding.result,
                "what_to_do": finding.advice,
                "files": finding.files,
            }
            for finding in findings
        ]
        content = {"usable": checkup.is_usable, "checks": rows}
        typer.echo(json.dumps(content, indent=2, ensure_ascii=False))
    else:
        print_checks(checks, output)
    return code


def print_files(checkup: Checkup, name: str, output: OutputFormat, *, strict: bool) -> int:
    """Print the files of one finding, a group per line, tabs between. Returns the exit code.

    Raises ConfigError for a finding that is not there.
    """
    findings = checkup.findings()
    chosen = [finding for finding in findings if _plain(finding.name) == _plain(name)]
    if not chosen:
        known = dict.fromkeys(finding.name for finding in findings if finding.files)
        raise ConfigError(
            f"there is no finding {name!r}",
            why="the table has other ones",
            fix=f"name one of: {', '.join(known)}" if known else "no finding is about single files",
        )
    _print_groups(chosen, output)
    return exit_code([finding.check for finding in findings], strict=strict)


def _print_groups(findings: Sequence[Finding], output: OutputFormat) -> None:
    groups = [group for finding in findings for group in finding.files]
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(groups, indent=2, ensure_ascii=False))
        return
    for group in groups:
        typer.echo("\t".join(group))


def _plain(name: str) -> str:
    return "".join(c for c in name.casefold() if c.isalnum())


@contextmanager
def progress() -> Iterator[Watch]:
    """A bar on stderr while a person watches, a line for each step otherwise."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    console, lock = Console(stderr=True), Lock()
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        tasks = {}

        def watch(what: str, done: int, total: int) -> None:
            with lock:
                if what not in tasks:
                    tasks[what] = bar.add_task(what, total=total)
                    if not console.is_terminal:
                        console.print(f"{what}: {total}" if total > 1 else what)
                bar.update(tasks[what], completed=done)

        yield watch
