"""What simulated hospitals were really charged and let out: a simulation may look, a server may not."""

import contextlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from client.ledger.ledger import Ledger
from client.ledger.records import EVALUATION
from common.errors import LedgerError
from common.files import write_bytes_atomically
from common.privacy.accountant import running_epsilon
from simulations.preparation import HOSPITALS


def charged(folder: Path, name: str, run_id: str) -> dict[str, Any]:
    """Epsilon, steps and updates of a hospital in a run, by its own ledger; empty without a private charge.

    `validation_epsilon` is what evaluations cost its validation patients, who do not train. Also counts what
    the server never read: a late update, a round that was given up, a charge before a crash.
    """
    try:
        charges = Ledger.open(folder / HOSPITALS / name / "ledger", create=False).charges()
    except LedgerError:
        return {}
    mine = [c for c in charges if c.key.run_id == run_id and c.claims_privacy and c.event and c.epsilon]
    scored = [c for c in mine if c.purpose == EVALUATION]
    own = [c for c in mine if c.purpose != EVALUATION]
    spent = {}
    if scored:
        events = [c.event for c in scored if c.event is not None]
        spent = {
            "validation_epsilon": running_epsilon(events, delta=scored[-1].delta),
            "validation_epsilon_complete": True,
        }
    if not own:
        return spent
    return spent | {
        "epsilon": max(c.epsilon for c in own if c.epsilon is not None),
        "epsilon_complete": True,
        "delta": own[-1].delta,
        "steps": sum(c.event.steps for c in own if c.event is not None),
        "releases": sum(c.sealed_sha256 is not None for c in own),
    }


def collect_audit(folder: Path, hospitals: Sequence[str]) -> None:
    """Write `audit.jsonl` of the run folder: every line of the hospitals' own audit logs, by time."""
    lines = []
    for name in hospitals:
        with contextlib.suppress(FileNotFoundError):
            own = (folder / HOSPITALS / name / "state" / "audit.jsonl").read_text().splitlines()
            lines += [{"hospital": name, **json.loads(line)} for line in own]
    lines.sort(key=lambda line: line["time"])
    text = "".join(json.dumps(line) + "\n" for line in lines)
    write_bytes_atomically(folder / "audit.jsonl", text.encode())
