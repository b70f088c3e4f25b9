"""`flower-client` from outside: words, JSON, exit codes, nothing heavy before it is needed."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from client.cli import app
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
    for word in ("check", "ledger", "models", "Exit codes"):
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
