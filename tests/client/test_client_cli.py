"""`flower-client` from outside: words, JSON, exit codes, nothing heavy before it is needed."""

import json
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
from common.bundle.bundle import bundle_sha256
from common.flower_programs import free_port
from common.health import HealthServer
from common.node_keys import load_public_key
from tests.client.small_hospital import ask, make_hospital, make_plan, training_request
from tests.client.test_closing import RUN, closing

COMMAND = Path(sys.executable).with_name("flower-client")


def call(*arguments):
    return subprocess.run(
        [str(COMMAND), *map(str, arguments)], capture_output=True, text=True, timeout=60, check=False
    )


def invoke(*arguments):
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


@pytest.fixture
def films(tmp_path):
    """Two classes of four films."""
    folder = tmp_path / "films"
    for number in range(8):
        path = folder / ("normal", "opacity")[number % 2] / f"film-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


def test_help_lists_the_commands_and_exit_codes():
    shown = call("--help")
    assert shown.returncode == 0
    for word in (
        "init",
        "check",
        "plan",
        "start",
        "status",
        "pause",
        "leave",
        "code",
        "renew-key",
        "ledger",
        "models",
        "Exit codes",
    ):
        assert word in shown.stdout


def test_check_counts_what_would_be_trained_on(films):
    answer = invoke("check", "--data", films, "--image-size", 12, "--format", "json")
    assert answer.exit_code == 0
    found = json.loads(answer.stdout)
    assert found["usable"]
    results = {row["check"]: row["result"] for row in found["checks"]}
    assert results["train images"] == "8 (normal 4, opacity 4)"
    assert "image" in results["unit of protection"]


def test_check_names_what_is_broken_and_fails(films):
    (films / "normal" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    answer = invoke("check", "--data", films, "--image-size", 12)
    assert answer.exit_code == 1
    assert "torn.png" in answer.stdout
    assert "max-skipped-share" in " ".join(answer.stdout.split())


@pytest.mark.parametrize(
    "arguments",
    [
        ("check", "--data", "/no/such/films"),
        ("ledger", "verify", "/no/such/ledger"),
        ("check", "--data", ".", "--image-size", "3"),
        ("check",),
    ],
)
def test_what_cannot_be_used_is_said_without_a_traceback(arguments):
    answer = call(*arguments)
    assert answer.returncode in (1, 2)
    assert "Traceback" not in answer.stderr + answer.stdout
    assert answer.stderr + answer.stdout


def test_models_lists_what_was_received(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    state = toml.parent / "state"
    assert json.loads(invoke("models", state, "--format", "json").stdout) == []
    ask(toml, training_request(run_id=RUN))
    ask(toml, closing())
    (model,) = json.loads(invoke("models", state, "--format", "json").stdout)
    assert (model["model"], model["state"]) == ("softmax", "whole")
    text = invoke("models", state)
    assert text.exit_code == 0
    assert model["sha256"][:16] in text.stdout


def test_the_ledger_of_a_hospital_that_has_trained_is_shown_and_verified(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    for number in (1, 2, 3):
        ask(toml, training_request(make_plan(), round_number=number))
    verified = invoke("ledger", "verify", toml.parent, "--format", "json")
    assert verified.exit_code == 0
    assert json.loads(verified.stdout) == {"ok": True, "charges": 3, "findings": []}
    shown = json.loads(invoke("ledger", "show", toml, "--format", "json").stdout)
    assert shown["private"]
    assert shown["patients"] == 24
    (run,) = shown["runs"]
    assert (run["rounds"], run["steps"], run["noise_multiplier"]) == (3, 6, 2.0)
    assert 0 < run["epsilon"] == shown["epsilon"]


def test_a_hospital_that_trained_without_privacy_is_told_so(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north", allow_non_private=True)
    ask(toml, training_request(make_plan(federation={"private": False})))
    assert "NO PRIVACY" in invoke("ledger", "show", toml.parent).stdout
    assert not json.loads(invoke("ledger", "show", toml.parent, "--format", "json").stdout)["private"]
    assert invoke("ledger", "verify", toml.parent).exit_code == 0


def test_help_answers_at_once_for_every_command():
    for words in (
        *("init", "check", "plan", "start", "status"),
        *("pause", "leave", "renew-key", "code", "models"),
    ):
        started = time.monotonic()
        shown = call(words, "--help")
        assert shown.returncode == 0
        assert "Usage" in shown.stdout
        assert time.monotonic() - started < 2  # 0.1 s alone; this machine is shared


def test_from_init_to_status_as_a_hospital_types_it(tmp_path, films):
    north = tmp_path / "north"
    made = call(
        *(
            "init",
            north,
            "--name",
            "north",
            "--patients",
            120,
            "--data",
            films,
            "--classes",
            "normal,opacity",
        ),
        *("--ledger", tmp_path / "ledger", "--runtime-port", free_port(), "--health-port", free_port()),
    )
    assert made.returncode == 0, made.stderr
    fingerprint = load_public_key(north / "keys/hospital.key.pub").fingerprint
    assert fingerprint in made.stdout
    assert "flower-server enroll north hospital.key.pub --patients 120" in made.stdout
    assert "PRIVATE" not in made.stdout
    again = call("init", north, "--name", "north", "--patients", 120, "--data", films)
    assert again.returncode == 2
    assert len(again.stderr.splitlines()) == 3

    checked = call("check", north, "--format", "json")
    assert checked.returncode == 1
    found = {row["name"]: row for row in json.loads(checked.stdout)["checks"]}
    assert {name for name, row in found.items() if row["state"] == "failed"} == {"enrolment", "server"}
    assert found["train images"]["result"] == "8 (normal 4, opacity 4)"
    assert all(row["fix"] for row in found.values() if row["state"] == "failed")

    (code,) = json.loads(call("code", "list", "--dir", north, "--format", "json").stdout)
    assert (code["sha256"], code["installed"]) == (bundle_sha256(), True)
    assert call("code", "accept", "ab" * 32, "--dir", north, "--note", "0.2.0").returncode == 0
    assert "ab" * 32 in call("code", "list", "--dir", north).stdout
    assert call("code", "withdraw", "abab", "--dir", north).returncode == 0
    assert call("code", "accept", "nonsense", "--dir", north).returncode == 2

    assert "pauses" in call("pause", north).stdout
    status = call("status", north, "--format", "json")
    assert status.returncode == 1  # no client runs
    told = json.loads(status.stdout)
    assert (told["name"], told["running"], told["health"]) == ("north", False, {"all": "unreachable"})
    assert told["paused_since"]
    assert "not running" in call("status", north).stdout
    assert "takes part again" in call("pause", north, "--off").stdout
    assert "flower-server revoke north" in call("leave", north).stdout
    assert json.loads(call("status", north, "--format", "json").stdout)["left_since"]
    assert call("leave", north, "--off").returncode == 0

    renewed = call("renew-key", north)
    assert renewed.returncode == 0
    assert fingerprint not in renewed.stdout
    assert "--replace-key" in renewed.stdout


def test_status_of_a_running_client_is_its_health_and_its_own_words(tmp_path, films):
    port = free_port()
    north = tmp_path / "north"
    arguments = ("--name", "north", "--patients", 120, "--data", films, "--health-port", port)
    assert invoke("init", north, *arguments).exit_code == 0
    (north / "state/status.json").write_text(
        '{"schema": 1, "last_round": 7, "last_error": "", "worker": {"phase": "idle", "since": null}}'
    )
    server = HealthServer(port)
    server.start()
    try:
        server.set("connection", serving=True)
        server.set("worker", serving=False)
        answer = invoke("status", north)
        assert answer.exit_code == 1
        assert "not-serving" in answer.stdout
        assert "runs, its worker is not ready" in answer.stdout
        assert "last round" in answer.stdout
        assert "worker phase" in answer.stdout
        for nothing in ("last error", "worker since", "schema"):
            assert nothing not in answer.stdout
        for service in ("", "worker"):
            server.set(service, serving=True)
        answer = invoke("status", north, "--format", "json")
        assert answer.exit_code == 0
        told = json.loads(answer.stdout)
        assert told["health"] == {"all": "serving", "connection": "serving", "worker": "serving"}
        assert told["status"]["last_round"] == 7
        assert "runs, connected" in invoke("status", north).stdout
    finally:
        server.stop()


def test_status_of_a_client_whose_server_has_gone_has_a_code_of_its_own(tmp_path, films):
    port = free_port()
    north = tmp_path / "north"
    arguments = ("--name", "north", "--patients", 120, "--data", films, "--health-port", port)
    assert invoke("init", north, *arguments).exit_code == 0
    server = HealthServer(port)
    server.start()
    try:
        server.set("worker", serving=True)
        server.set("connection", serving=False)
        answer = invoke("status", north)
        assert answer.exit_code == 3
        assert "runs, waits for the server (not connected yet)" in answer.stdout
        moment = datetime.now(UTC)
        told = {
            "last_connected": moment.isoformat(),
            "last_error": "it has gone\nforged \x1b[2J\nnothing\nmore",
        }
        (north / "state/status.json").write_text(json.dumps(told))
        answer = invoke("status", north)
        assert answer.exit_code == 3
        then = moment.astimezone().strftime("%H:%M")
        assert f"runs, waits for the server (last connected {then})" in answer.stdout
        assert "\x1b" not in answer.stdout
        assert json.loads(invoke("status", north, "--format", "json").stdout)["waits_for_server"] is True
        (north / "state/status.json").write_text('{"last_connected": "2030-01-02T03:04:05+00:00"}')
        assert "(last connected 2030-01-0" in invoke("status", north).stdout
        (north / "state/status.json").write_text('{"last_connected": [1]}')
        assert invoke("status", north).exit_code == 3
    finally:
        server.stop()
    assert invoke("status", north).exit_code == 1
    assert " 3 " in " ".join(call("status", "--help").stdout.split())


@pytest.mark.parametrize(
    "words",
    [("check",), ("start",), ("status",), ("pause",), ("leave",), ("renew-key",), ("code", "list", "--dir")],
)
def test_a_folder_that_is_no_hospital_is_refused_in_words(tmp_path, words):
    answer = call(*words, tmp_path)
    assert answer.returncode == 2, answer.stderr
    assert "hospital.toml" in answer.stderr
    assert "Traceback" not in answer.stderr


def test_two_programs_on_one_port_are_refused_with_the_remedy(tmp_path, films):
    arguments = ("--name", "north", "--patients", 120, "--data", films, "--runtime-port", 9095)
    answer = call("init", tmp_path / "x", *arguments)
    assert answer.returncode == 2
    for words in ("connection.runtime-port", "connection.health-port", "both 9095", "health-port = 9096"):
        assert words in answer.stderr
    assert not (tmp_path / "x").exists()


def test_init_refuses_a_name_that_no_roster_takes(tmp_path, films):
    answer = call("init", tmp_path / "x", "--name", "St. Mary's", "--patients", 120, "--data", films)
    assert answer.returncode == 2
    assert "hospital.name" in answer.stderr
    assert not (tmp_path / "x").exists()
