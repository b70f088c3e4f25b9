"""`flower-server` as it is called: real processes where the entry point matters, real folders everywhere."""

import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from common.files import sha256_of_file
from common.parameters import parameters_sha256, read_safetensors, write_safetensors
from server.cli import app
from tests.run_folders import build_run

ROOT = Path(__file__).resolve().parents[2]

HOLD_LOCK = """
import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


def call(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def flower_server(*arguments):
    command = [sys.executable, "-c", "from server.cli import main; main()", *map(str, arguments)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def run_with_model(tmp_path):
    weights = {"layer.weight": np.ones((2, 3), np.float32)}
    model = {"name": "cnn-small", "parameters": 6, "sha256": parameters_sha256(weights)}
    folder = build_run(tmp_path / "runs" / "run-0001", model=model)
    write_safetensors(folder / "model.safetensors", weights)
    (folder / "model.json").write_text('{"schema": 1}\n')
    return folder


@pytest.fixture
def locked():
    """Holds the lock of a run folder from another process, as a server does."""
    holders = []

    def hold(folder):
        command = [sys.executable, "-c", HOLD_LOCK, str(folder / ".lock")]
        holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        holders.append(holder)
        assert holder.stdout.readline() == "held\n"

    yield hold
    for holder in holders:
        holder.communicate("", timeout=30)


def test_help_is_quick_and_says_that_it_is_not_flowers_old_command():
    best = min(_seconds_of_help() for _ in range(3))
    assert best < 0.5
    text = " ".join(flower_server("--help").stdout.split())
    assert "Not the command of the same name that old releases of Flower had" in text
    assert "init DIR, enroll each hospital, check DIR, start DIR" in text
    assert "3 stopped, 4 quorum lost, 5 budgets exhausted" in text


def _seconds_of_help():
    began = time.perf_counter()
    assert flower_server("--help").returncode == 0
    return time.perf_counter() - began


def test_only_commands_that_work_today_are_offered():
    names = {command.name or command.callback.__name__ for command in app.registered_commands}
    of_a_run = {"list", "status", "report", "export", "stop"}
    of_a_federation = {"init", "enroll", "revoke", "roster", "check", "start", "resume", "renew"}
    assert names == of_a_run | of_a_federation | {"backup", "restore"}


def test_list_shows_runs_newest_first_in_both_formats(tmp_path):
    runs = tmp_path / "runs"
    build_run(runs / "one", run_id="one")
    build_run(runs / "two", run_id="two", private=False)
    (runs / "broken").mkdir()
    (runs / "broken" / "result.json").write_text("{")
    (runs / "not-a-run").mkdir()
    rows = json.loads(call("list", "--runs", runs, "--format", "json").stdout)
    assert [row["run_id"] for row in rows] == ["broken", "two", "one"]
    assert [row["status"] for row in rows] == ["unreadable", "completed", "completed"]
    assert rows[2]["epsilon"] == pytest.approx(2.65)
    assert rows[1]["epsilon"] is None
    text = call("list", "--runs", runs).stdout
    assert "not private" in text
    assert "2026-09-21 14:13" in text
    assert call("list", "--runs", tmp_path / "nowhere").stdout.startswith("no runs in")
    assert json.loads(call("list", "--runs", tmp_path / "nowhere", "--format", "json").stdout) == []


def test_status_tells_how_far_a_run_is_by_folder_and_by_id(tmp_path):
    folder = build_run(tmp_path / "runs" / "run-0001")
    by_id = call("status", "run-0001", "--runs", tmp_path / "runs", "--format", "json")
    by_folder = call("status", folder, "--format", "json")
    assert by_id.stdout == by_folder.stdout
    overview = json.loads(by_id.stdout)
    assert (overview["rounds"], overview["rounds_planned"], overview["stop_requested"]) == (6, 6, False)
    north = overview["hospitals"][0]
    assert (north["outcome"], north["code"], north["enrolled_patients"]) == ("refused", "budget-spent", 100)
    text = call("status", folder).stdout
    assert "round 6 of 6" in text
    assert "refused (budget-spent)" in text


def test_killed_run_is_interrupted_and_a_locked_one_running(tmp_path, locked):
    folder = build_run(tmp_path / "run")
    (folder / "result.json").unlink()
    assert json.loads(call("status", folder, "--format", "json").stdout)["status"] == "interrupted"
    locked(folder)
    assert json.loads(call("status", folder, "--format", "json").stdout)["status"] == "running"


def test_stop_leaves_the_file_in_a_running_run_only(tmp_path, locked):
    folder = build_run(tmp_path / "run")
    refused = flower_server("stop", folder)
    assert refused.returncode == 2
    assert "is not going on" in refused.stderr
    assert not (folder / "stop").exists()
    locked(folder)
    assert flower_server("stop", folder).returncode == 0
    assert (folder / "stop").read_bytes() == b""
    assert "a stop was asked for" in call("status", folder).stdout


def test_report_writes_page_pictures_and_card_again(tmp_path):
    folder = build_run(tmp_path / "run")
    result = call("report", folder)
    assert result.stdout.strip() == str(folder / "report.html")
    assert (folder / "MODEL_CARD.md").is_file()
    assert len(list((folder / "plots").glob("*.png"))) == 8


def test_export_copies_the_model_and_nothing_of_the_run(run_with_model, tmp_path):
    out = tmp_path / "out"
    assert call("export", run_with_model, "--out", out).exit_code == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "MODEL_CARD.md",
        "SHA256SUMS",
        "model.json",
        "model.safetensors",
    ]
    assert read_safetensors(out / "model.safetensors")["layer.weight"].shape == (2, 3)
    for line in (out / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split("  ")
        assert sha256_of_file(out / name) == digest


def test_export_refuses_altered_weights_and_a_run_without_a_model(run_with_model, tmp_path):
    write_safetensors(run_with_model / "model.safetensors", {"layer.weight": np.zeros((2, 3), np.float32)})
    altered = flower_server("export", run_with_model, "--out", tmp_path / "out")
    assert altered.returncode == 1
    assert "are not those of the run's result" in altered.stderr
    assert not (tmp_path / "out").exists()
    (run_with_model / "model.safetensors").unlink()
    assert (
        "has no model.safetensors"
        in flower_server("export", run_with_model, "--out", tmp_path / "out").stderr
    )


def test_errors_are_three_lines_and_a_traceback_only_with_debug(tmp_path):
    plain = flower_server("report", tmp_path)
    assert plain.returncode == 2
    assert len(plain.stderr.strip().splitlines()) == 3
    assert "Traceback" not in plain.stderr
    assert "Traceback" in flower_server("--debug", "report", tmp_path).stderr
    unnamed = flower_server("report")
    assert unnamed.returncode == 2
    assert "no run is named" in unnamed.stderr
    folder = build_run(tmp_path / "run")
    (folder / "plots").touch()
    unwritable = flower_server("report", folder)
    assert unwritable.returncode == 1
    assert "Traceback" not in unwritable.stderr
