"""A real federation for a test: `flower-simulate run --engine processes` or its parts, and what it leaves."""

import contextlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

from client.ledger.ledger import Ledger
from common.enrolment import ENROLMENT, Enrolment
from common.settings import load, to_toml
from simulations.engines.rehearsal import Rehearsal
from simulations.preparation import prepare
from simulations.scenario import make_scenario

BIN = Path(sys.executable).parent
GIVE_UP_S = 240.0


def until(condition: Callable[[], bool], *, patience_s: float = GIVE_UP_S, what: str = "it") -> None:
    give_up_at = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up_at, f"{what} did not happen in {patience_s:.0f} s"
        time.sleep(0.02)


@contextlib.contextmanager
def rehearsed(folder: Path, *more: str) -> Iterator["subprocess.Popen[str]"]:
    """`flower-simulate run --engine processes` in a group of its own, which is gone afterwards."""
    arguments = ["run", "--engine", "processes", "--out", str(folder), "--quiet", *more]
    process = subprocess.Popen(
        [str(BIN / "flower-simulate"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()
        until(lambda: not processes_of(folder), patience_s=20, what="the end of every process")


def prepared(
    folder: Path, *, hospitals: int = 2, rounds: int = 3, settings: tuple[str, ...] = ()
) -> Rehearsal:
    """A rehearsal on generated images that has been prepared and not provisioned yet."""
    flags = {"hospitals": hospitals, "rounds": rounds, "engine": "processes", "out": str(folder)}
    ready = prepare(make_scenario(flags | {"set": settings}))
    return Rehearsal(ready.config, hospitals=[hospital.name for hospital in ready.hospitals])


def go_through(rehearsal: Rehearsal, name: str, port: int) -> None:
    """Have a hospital reach the server by another port of loopback: that of a cable or a proxy."""
    path = rehearsal.hospital(name) / ENROLMENT
    enrolment = load(Enrolment, path)
    changed = enrolment.model_copy(update={"address": f"127.0.0.1:{port}"})
    path.write_text(to_toml(changed))


def finished(process: "subprocess.Popen[str]", *, status: int = 0) -> str:
    out, err = process.communicate(timeout=GIVE_UP_S)
    assert process.returncode == status, out + err
    return out + err


def who_runs(folder: Path) -> dict[str, dict]:
    try:
        return json.loads((folder / "rehearsal.json").read_text())
    except (OSError, ValueError):
        return {}


def processes_of(folder: Path) -> list[int]:
    """Living processes whose command line names the run's folder."""
    found = []
    for entry in Path("/proc").iterdir():
        with contextlib.suppress(OSError, IndexError):
            is_ours = entry.name.isdigit() and str(folder).encode() in (entry / "cmdline").read_bytes()
            if is_ours and (entry / "stat").read_text().rsplit(")", 1)[1].split()[0] != "Z":
                found.append(int(entry.name))
    return found


def metrics(folder: Path) -> list[dict]:
    try:
        text = (folder / "metrics.jsonl").read_text()
    except OSError:
        return []
    return [json.loads(line) for line in text[: text.rfind("\n") + 1].splitlines() if line]


def closed(folder: Path) -> list[int]:
    return [line["round"] for line in metrics(folder) if "closed" in line]


def result(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def charged_rounds(folder: Path, name: str) -> list[tuple[int, bool]]:
    """(round, sealed) of each charge of a hospital, read beside whoever writes it."""
    path = folder / "hospitals" / name / "ledger" / "ledger.sqlite"
    try:
        ledger = sqlite3.connect(f"file:{path}?mode=ro", uri=True, timeout=10)
        with contextlib.closing(ledger):
            query = "SELECT round_number, EXISTS(SELECT 1 FROM seals WHERE charge = c.number) FROM charges c"
            return [(number, bool(sealed)) for number, sealed in ledger.execute(query)]
    except sqlite3.OperationalError:
        return []


def nobody_was_charged_twice(folder: Path, names: list[str]) -> None:
    for name in names:
        ledger = Ledger.examine(folder / "hospitals" / name / "ledger")
        assert ledger.verify() == []
        keys = Counter(str(charge.key) for charge in ledger.charges())
        assert set(keys.values()) <= {1}


def every_round_once(folder: Path, rounds: int) -> None:
    assert sorted(closed(folder)) == list(range(1, rounds + 1))
    told = Counter((line["round"], line.get("hospital")) for line in metrics(folder))
    assert set(told.values()) == {1}


def overheads(folder: Path) -> list[float]:
    """Seconds from departure to the closed round, less the slowest training, from round 2 on."""
    found = []
    for line in metrics(folder):
        if "closed" in line and line["round"] > 1:
            here = [m for m in metrics(folder) if m["round"] == line["round"] and m.get("training_ended")]
            slowest = max(m["training_ended"] - m["training_started"] for m in here)
            found.append(line["closed"] - min(m["sent"] for m in here) - slowest)
    return found
