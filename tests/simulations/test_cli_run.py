"""The command from outside: exit codes, words, speed, and runs that are stopped, killed and resumed."""

import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest

from simulations.cli import main

ROOT = Path(__file__).resolve().parents[2]
ROUNDS = 6
FLAGS = [
    "--hospitals",
    "2",
    "--image-size",
    "28",
    "--rounds",
    str(ROUNDS),
    "--set",
    "training.physical-batch-size=64",
]


def start(*arguments: str, cwd: Path = ROOT) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "simulations.cli", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=cwd, env=environment
    )


def call(*arguments: str, cwd: Path = ROOT) -> "subprocess.CompletedProcess[str]":
    with start(*arguments, cwd=cwd) as process:
        out, err = process.communicate(timeout=240)
        return subprocess.CompletedProcess(arguments, process.returncode, out, err)


def closed_rounds(folder: Path) -> list[int]:
    try:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError):
        return []
    return [line["round"] for line in lines if "closed" in line]


def interrupt_after(
    process: "subprocess.Popen[str]", folder: Path, rounds: int, act: Callable[[], None]
) -> None:
    deadline = time.monotonic() + 180
    while len(closed_rounds(folder)) < rounds:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    act()


def result_of(folder: Path) -> dict:
    return json.loads((folder / "result.json").read_text())


def charges(folder: Path) -> dict[str, list[int]]:
    """Rounds charged by each hospital, from its own ledger."""
    found = {}
    for path in folder.glob("hospitals/*/ledger/ledger.sqlite"):
        with sqlite3.connect(f"file:{path}?mode=ro", uri=True) as ledger:
            rows = ledger.execute("SELECT round_number FROM charges ORDER BY number").fetchall()
        ledger.close()
        found[path.parents[1].name] = [row[0] for row in rows]
    return found


def test_help_answers_at_once_and_names_the_exit_codes() -> None:
    took = []
    for _ in range(3):
        started = time.monotonic()
        answer = call("--help")
        took.append(time.monotonic() - started)
    assert answer.returncode == 0
    assert "3 stopped" in answer.stdout
    assert min(took) < 0.5


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["run", "--partition", "thirds"], "dirichlet:ALPHA"),
        (["run", "--private", "false", "--epsilon", "1"], "--epsilon"),
        (["run", "--data", "no-such-file.npz"], "no-such-file"),
        (["run", "--set", "server.quorom=3"], "server.quorum"),
        (["resume", "no-such-folder"], "no-such-folder"),
    ],
)
def test_bad_settings_are_three_lines_and_exit_code_2(
    tmp_path: Path, arguments: list[str], words: str
) -> None:
    answer = call(*arguments, cwd=tmp_path)
    assert answer.returncode == 2
    assert words in answer.stderr
    assert len(answer.stderr.splitlines()) <= 3
    assert "Traceback" not in answer.stderr
    assert not (tmp_path / "runs").exists()


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    assert "Traceback" in call("run", "--data", "no-such-file.npz", "--debug", cwd=tmp_path).stderr


def test_generated_data_can_be_written(tmp_path: Path) -> None:
    answer = call("data", str(tmp_path / "d"), "--layout", "npz", "--patients", "8", "--format", "json")
    assert answer.returncode == 0
    assert Path(json.loads(answer.stdout)["data"]).is_file()


def call_here(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str
) -> tuple[int, str, str]:
    """The command inside this process, which has its fork server ready; gives exit code and both outputs."""
    monkeypatch.setattr(sys, "argv", ["flower-simulate", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), captured.out, captured.err


def test_a_reproducible_run_killed_and_resumed_gives_the_same_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    here = partial(call_here, monkeypatch, capsys)
    code, out, err = here(
        "run", *FLAGS, "--reproducible", "--format", "json", "--out", str(tmp_path / "whole")
    )
    assert code == 0, err
    result = json.loads(out)
    assert result == result_of(tmp_path / "whole")
    assert (result["status"], result["rounds"], result["private"]) == ("completed", ROUNDS, False)
    assert result["engine"] == "embedded"
    assert result["test"]["auc"] is not None
    assert all(hospital["epsilon"] is None for hospital in result["hospitals"])
    assert (tmp_path / "whole" / "report.html").is_file()

    with start("run", *FLAGS, "--reproducible", "--quiet", "--out", str(tmp_path / "killed")) as process:
        interrupt_after(process, tmp_path / "killed", 2, process.kill)
        process.wait()
    assert len(closed_rounds(tmp_path / "killed")) < ROUNDS
    time.sleep(1)  # its workers notice the death and let go of their ledgers
    code, out, err = here("resume", str(tmp_path / "killed"), "--format", "json")
    assert code == 0, err
    assert json.loads(out)["model"]["sha256"] == result["model"]["sha256"]
    assert closed_rounds(tmp_path / "killed") == list(range(1, ROUNDS + 1))
    code, _, err = here("resume", str(tmp_path / "killed"))
    assert code == 2
    assert "complete" in err


@pytest.mark.faults
def test_a_private_run_stopped_then_killed_charges_nobody_twice(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    with start("run", *FLAGS, "--epsilon", "8", "--quiet", "--out", str(folder)) as process:
        interrupt_after(process, folder, 1, lambda: process.send_signal(signal.SIGINT))
        out, err = process.communicate(timeout=120)
    assert process.returncode == 3, err
    assert result_of(folder)["status"] == "stopped"
    assert f"flower-simulate resume {folder}" in out
    done = len(closed_rounds(folder))
    assert 1 <= done < ROUNDS

    with start("resume", str(folder), "--quiet") as process:
        interrupt_after(process, folder, done + 1, process.kill)
        process.wait()
    time.sleep(1)  # its workers notice the death and let go of the ledgers
    finished = call("resume", str(folder), "--quiet")
    assert finished.returncode == 0, finished.stderr
    result = result_of(folder)
    assert result["private"]
    assert all(0 < hospital["epsilon"] <= 8 for hospital in result["hospitals"])
    spent = charges(folder)
    assert len(spent) == 2
    assert all(rounds == list(range(1, ROUNDS + 1)) for rounds in spent.values()), spent
