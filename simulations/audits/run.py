"""Runs audits one after the other and writes down what they found."""

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from common.errors import ConfigError, FederationError
from simulations.audits.catalogue import AUDITS, Audit
from simulations.audits.finding import Finding

JSON, PAGE = "audit.json", "audit.html"
SCHEMA = 1


def audit_names() -> tuple[str, ...]:
    """What `--only` takes."""
    return tuple(dict.fromkeys(audit.name for audit in AUDITS))


def chosen_audits(only: Sequence[str]) -> tuple[Audit, ...]:
    """The audits of these names, all for none. Raises ConfigError for an unknown name."""
    if unknown := sorted(set(only) - set(audit_names())):
        raise ConfigError(
            f"there is no audit {unknown[0]!r}", fix=f"choose some of {', '.join(audit_names())}"
        )
    return tuple(audit for audit in AUDITS if not only or audit.name in only)


def carry_out(audit: Audit, folder: Path, *, quick: bool) -> Finding:
    """Run one audit; one that cannot be carried out has not passed."""
    started = time.perf_counter()
    try:
        finding = audit.run(folder, quick)
    except Exception as error:
        kind = error.what if isinstance(error, FederationError) else f"{type(error).__name__}: {error}"
        finding = Finding(audit=audit.name, passed=False, said=f"It could not be carried out: {kind}")
    return replace(finding, wall_s=time.perf_counter() - started)


def run_audits(
    audits: Sequence[Audit],
    folder: Path,
    *,
    quick: bool,
    began: Callable[[Audit], None],
    ended: Callable[[Audit, Finding], None],
) -> dict[str, Any]:
    """Run the audits in order, write audit.json and audit.html into `folder`, return the JSON's content."""
    from common.files import write_bytes_atomically, write_json_atomically
    from simulations.audits.page import page
    from simulations.benchmarks.machine import describe_machine, usable_cores

    folder.mkdir(parents=True, exist_ok=True)
    started, found = time.time(), []
    for audit in audits:
        began(audit)
        finding = carry_out(audit, folder, quick=quick)
        found.append((audit, finding))
        ended(audit, finding)
    content = {
        "schema": SCHEMA,
        "passed": all(finding.passed for _, finding in found),
        "quick": quick,
        "findings": [_plain(audit, finding) for audit, finding in found],
        "time": {"started": started, "wall_s": time.time() - started},
        "machine": describe_machine(threads=usable_cores()),
    }
    write_json_atomically(folder / JSON, content)
    write_bytes_atomically(folder / PAGE, page(content, folder).encode())
    return content


def _plain(audit: Audit, finding: Finding) -> dict[str, Any]:
    """A finding as JSON can hold it: numbers that are not finite become null."""
    return {
        **asdict(replace(finding, numbers={})),
        "name": audit.name,
        "title": audit.title,
        "tries": audit.tries,
        "numbers": _finite(finding.numbers),
        "pictures": list(finding.pictures),
    }


def _finite(numbers: Mapping[str, float]) -> dict[str, float | None]:
    return {name: float(value) if math.isfinite(value) else None for name, value in numbers.items()}
