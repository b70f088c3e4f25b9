"""Processes killed, files torn, ledgers damaged in mid-run: nobody is charged twice, nothing is lost.

`.ci/run` runs those with `ci` in their name; `make faults` runs all.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from client.ledger.ledger import Ledger
from simulations.engines.embedded import EmbeddedGrid
from simulations.run import run_scenario
from simulations.scenario import make_scenario
from tests.deployment.federation import charged_rounds as charged
from tests.deployment.federation import closed as closed_rounds
from tests.deployment.federation import metrics as lines_of
from tests.deployment.federation import result as result_of
from tests.planted_films import SIZE, write_table

pytestmark = pytest.mark.faults
ROOT, BIN = Path(__file__).resolve().parents[1], Path(sys.executable).parent
PATIENTS = {"east": 60, "west": 40}
ROUNDS = 6
GIVE_UP_S = 150


@pytest.fixture(scope="module")
def films(tmp_path_factory) -> Path:
    return write_table(tmp_path_factory.mktemp("films"), patients=PATIENTS)


def flags(films: Path, folder: Path, *more: str) -> list[str]:
    found = ["run", "--data", str(films), "--partition", "column:site", "--image-size", str(SIZE), "--quiet"]
    return [*found, "--rounds", str(ROUNDS), "--out", str(folder), *more]


@contextlib.contextmanager
def started(*arguments: str, cores: set[int] | None = None) -> Iterator["subprocess.Popen[str]"]:
    """`flower-simulate` in a process group of its own, which is gone afterwards, whatever happens."""
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "XDG_CACHE_HOME": str(Path(os.devnull).parent / "shm"),
    }
    environment.pop("XDG_CACHE_HOME")
    limit = (lambda: os.sched_setaffinity(0, cores)) if cores else None
    process = subprocess.Popen(
        [str(BIN / "flower-simulate"), *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=limit,
    )
    try:
        yield process
    finally:
        kill_group(process)
        process.communicate()


def kill_group(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def finish(*arguments: str, cores: set[int] | None = None, exit_code: int = 0) -> str:
    """Run a command to its end; gives what it says on both streams."""
    with started(*arguments, cores=cores) as process:
        out, err = process.communicate(timeout=GIVE_UP_S)
        assert process.returncode == exit_code, err
        return out + err


def wait_for(condition: Callable[[], bool], process: "subprocess.Popen[str]") -> None:
    give_up_at = time.monotonic() + GIVE_UP_S
    while not condition():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < give_up_at
        time.sleep(0.002)


def training(folder: Path, round_number: int) -> int:
    """How many hospitals have charged this round and not sealed their answer."""
    return sum((round_number, False) in charged(folder, name) for name in PATIENTS)


def nobody_was_charged_twice(folder: Path, *, names=tuple(PATIENTS), rounds: int = ROUNDS) -> None:
    for name in names:
        ledger = Ledger.examine(folder / "hospitals" / name / "ledger")
        assert ledger.verify() == []
        charges = ledger.charges()
        assert [charge.key.round_number for charge in charges] == list(range(1, rounds + 1))
        assert len({charge.key for charge in charges}) == rounds
        assert all(charge.sealed_sha256 for charge in charges)
    told = Counter((line["round"], line.get("hospital")) for line in lines_of(folder))
    assert set(told.values()) == {1}
    assert sorted(closed_rounds(folder)) == list(range(1, rounds + 1))


def verified(folder: Path, name: str) -> int:
    command = [str(BIN / "flower-client"), "ledger", "verify", str(folder / "hospitals" / name)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, env=environment, capture_output=True, timeout=120, check=False).returncode


# --- the whole machine goes down ---


@pytest.fixture(scope="module")
def whole(films, tmp_path_factory) -> str:
    """Hash of the model of an undisturbed reproducible run."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    finish(*flags(films, folder, "--reproducible"))
    return result_of(folder)["model"]["sha256"]


def test_ci_a_reproducible_run_killed_in_round_3_ends_with_the_same_model(films, whole, tmp_path):
    folder = tmp_path / "run"
    with started(*flags(films, folder, "--reproducible")) as process:
        wait_for(lambda: closed_rounds(folder)[-1:] == [2] and training(folder, 3) > 0, process)
        kill_group(process)
        process.wait()
    assert closed_rounds(folder) == [1, 2]
    assert not (folder / "result.json").exists()
    finish("resume", str(folder), "--quiet")
    result = result_of(folder)
    assert (result["status"], result["rounds"], result["private"]) == ("completed", ROUNDS, False)
    assert result["model"]["sha256"] == whole
    nobody_was_charged_twice(folder)


def test_ci_a_private_run_killed_twice_charges_each_round_once(films, tmp_path):
    folder = tmp_path / "run"
    command = flags(films, folder, "--epsilon", "4")
    for number in (1, 3):
        with started(*command) as process:
            wait_for(lambda number=number: training(folder, number) > 0, process)
            kill_group(process)
            process.wait()
        command = ["resume", str(folder), "--quiet"]
    finish(*command)
    result = result_of(folder)
    assert (result["status"], result["rounds"], result["private"]) == ("completed", ROUNDS, True)
    nobody_was_charged_twice(folder)
    for hospital in result["hospitals"]:
        assert 0.9 * 4 < hospital["epsilon"] <= 4
        assert hospital["steps"] == ROUNDS
        assert verified(folder, hospital["name"]) == 0


def test_ci_a_torn_checkpoint_is_passed_over_and_sealed_answers_are_sent_again(films, tmp_path):
    folder = tmp_path / "run"
    with started(*flags(films, folder, "--epsilon", "4")) as process:
        wait_for(lambda: closed_rounds(folder)[-1:] == [4], process)
        kill_group(process)
        process.wait()
    newest = max(
        (p for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()), key=lambda p: int(p.name)
    )
    models = {line["round"]: line["model_sha256"] for line in lines_of(folder) if "closed" in line}
    model = newest / "model.safetensors"
    model.write_bytes(model.read_bytes()[:-100])
    finish("resume", str(folder), "--quiet")
    nobody_was_charged_twice(folder)
    after = {line["round"]: line["model_sha256"] for line in lines_of(folder) if "closed" in line}
    # The round of the torn checkpoint was asked again, and the same sealed updates gave the same model.
    assert {number: after[number] for number in models} == models


def test_lost_checkpoints_and_answers_need_a_new_attempt_which_is_charged_within_the_budget(films, tmp_path):
    folder = tmp_path / "run"
    with started(*flags(films, folder, "--epsilon", "4", "--set", "server.patience-s=3")) as process:
        wait_for(lambda: closed_rounds(folder)[-1:] == [4], process)
        kill_group(process)
        process.wait()
    for checkpoint in (folder / "checkpoints").iterdir():
        if not checkpoint.name.isdecimal() or int(checkpoint.name) > 2:
            shutil.rmtree(checkpoint)
    shutil.rmtree(folder / "hospitals" / "east" / "state" / "outbox")
    # Round 3 closes with the answer that west still has; then both have answered round 4 for other weights.
    said = finish("resume", str(folder), "--quiet", exit_code=4)
    assert "write a higher number into `attempt`" in said
    refused = {
        (line["round"], line["hospital"], line["code"]) for line in lines_of(folder) if line.get("code")
    }
    conflict = "round-already-answered-for-other-weights"
    assert refused == {(3, "east", conflict), (4, "east", conflict), (4, "west", conflict)}

    (folder / "attempt").write_text("2")
    # The noise was chosen for six rounds, and at least one is charged twice now: the budget ends first.
    finish("resume", str(folder), "--quiet", exit_code=5)
    assert result_of(folder)["status"] == "budget-exhausted"
    for hospital in result_of(folder)["hospitals"]:
        ledger = Ledger.examine(folder / "hospitals" / hospital["name"] / "ledger")
        asked = [(charge.key.attempt, charge.key.round_number) for charge in ledger.charges()]
        assert len(asked) == len(set(asked)) == ROUNDS
        assert (1, 4) in asked
        assert (2, 4) in asked
        assert ledger.verify() == []
        assert ledger.spent(hospital["delta"]).epsilon <= 4
        assert hospital["epsilon"] <= 4


@pytest.mark.parametrize("damage", ["altered", "key lost", "gone"])
def test_a_hospital_with_a_damaged_ledger_trains_no_more_and_the_others_go_on(films, tmp_path, damage):
    folder = tmp_path / "run"
    with started(*flags(films, folder, "--epsilon", "4")) as process:
        wait_for(lambda: closed_rounds(folder)[-1:] == [2], process)
        kill_group(process)
        process.wait()
    ledger = folder / "hospitals" / "east" / "ledger"
    before = charged(folder, "east")
    if damage == "altered":
        content = bytearray((ledger / "ledger.sqlite").read_bytes())
        content[len(content) // 2] ^= 255
        (ledger / "ledger.sqlite").write_bytes(content)
    elif damage == "key lost":
        (ledger / "site.key").unlink()
    else:
        (ledger / "ledger.sqlite").unlink()
    out = finish("resume", str(folder), "--quiet")
    assert "completed" in out
    later = [
        line for line in lines_of(folder) if line.get("hospital") == "east" and line["round"] > len(before)
    ]
    assert all(line["outcome"] != "aggregated" for line in later)
    own = {hospital["name"]: hospital for hospital in result_of(folder)["hospitals"]}
    assert own["west"]["rounds"] == ROUNDS
    assert own["east"]["rounds"] < ROUNDS
    assert verified(folder, "west") == 0
    assert verified(folder, "east") in (1, 2)


def test_the_same_model_on_one_core_as_on_all(films, whole, tmp_path):
    folder = tmp_path / "run"
    finish(*flags(films, folder, "--reproducible"), cores={min(os.sched_getaffinity(0))})
    assert result_of(folder)["model"]["sha256"] == whole


# --- one process goes down ---


class Killer(threading.Thread):
    """Kills one worker process or all of them while each trains a hospital's round 2."""

    def __init__(self, folder: Path, grids: list[EmbeddedGrid], *, everybody: bool) -> None:
        super().__init__(daemon=True)
        self.folder, self.grids, self.everybody = folder, grids, everybody
        self.killed: list[int] = []

    def run(self) -> None:
        give_up_at = time.monotonic() + GIVE_UP_S
        while not self._all_are_training():
            if time.monotonic() > give_up_at:
                return
            time.sleep(0.002)
        workers = self.grids[0].pool.process_ids
        for pid in workers if self.everybody else workers[:1]:
            os.kill(pid, signal.SIGKILL)
            self.killed.append(pid)

    def _all_are_training(self) -> bool:
        return bool(self.grids) and training(self.folder, 2) == self.grids[0].pool.num_workers


def run_with_a_killer(films, folder, monkeypatch, *, everybody: bool, quorum: int) -> dict:
    """Four rounds, long enough to kill in the middle of one; gives result.json."""
    grids: list[EmbeddedGrid] = []
    create = EmbeddedGrid.__init__

    def remember(grid, *arguments, **named):
        create(grid, *arguments, **named)
        grids.append(grid)

    monkeypatch.setattr(EmbeddedGrid, "__init__", remember)
    killer = Killer(folder, grids, everybody=everybody)
    killer.start()
    settings = ("privacy.local-steps=40", f"server.quorum={quorum}")
    asked = {"data": str(films), "partition": "column:site", "image_size": SIZE, "rounds": 4, "epsilon": 8.0}
    outcome = run_scenario(make_scenario({**asked, "set": settings, "out": str(folder)}))
    killer.join(timeout=10)
    assert len(killer.killed) == (grids[0].pool.num_workers if everybody else 1)
    assert outcome.status == "completed"
    return outcome.result


def test_ci_workers_killed_while_they_train_are_replaced_and_train_on_the_same_charge(
    films, tmp_path, monkeypatch
):
    result = run_with_a_killer(films, tmp_path / "run", monkeypatch, everybody=True, quorum=2)
    nobody_was_charged_twice(tmp_path / "run", rounds=4)
    assert [hospital["rounds"] for hospital in result["hospitals"]] == [4, 4]
    sent = Counter()
    for line in lines_of(tmp_path / "run"):
        sent[line["round"]] += line.get("bytes_down", 0)
    # Round 2 was sent again, for the quorum was missing; the others were sent once. From round 2 on the
    # receipts of the ledgers are echoed.
    assert sent[1] < sent[3] == sent[4] < sent[2] <= 2 * sent[3]


def test_a_worker_killed_while_it_trains_costs_one_hospital_one_round(films, tmp_path, monkeypatch):
    result = run_with_a_killer(films, tmp_path / "run", monkeypatch, everybody=False, quorum=1)
    lines = [line for line in lines_of(tmp_path / "run") if line.get("hospital")]
    failed = [(line["round"], line["code"]) for line in lines if line["outcome"] == "failed"]
    assert failed == [(2, "flower-8")]
    assert all(line["outcome"] == "aggregated" for line in lines if line["outcome"] != "failed")
    for name in PATIENTS:
        ledger = Ledger.examine(tmp_path / "run" / "hospitals" / name / "ledger")
        assert [charge.key.round_number for charge in ledger.charges()] == [1, 2, 3, 4]
        assert ledger.verify() == []
    assert sorted(hospital["rounds"] for hospital in result["hospitals"]) == [3, 4]
