"""`flower-client plan` from outside: words, JSON, picture, exit codes."""

import json

import pytest
from typer.testing import CliRunner

import client.planning.report
from client.cli import app
from tests.client.planning.planned_hospital import enrol, train
from tests.client.small_hospital import charges, make_hospital, make_plan
from tests.client.test_client_cli import call

QUICK = ("--without-choices", "--without-timing")


def invoke(*arguments):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


@pytest.fixture
def hospital(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north", noise_multiplier=3.0, epsilon=7.0, maximum_rounds=9)
    enrol(toml)
    train(toml, make_plan(), rounds=1)
    return toml


def test_a_hospital_sees_its_plan_and_a_picture(hospital, tmp_path, monkeypatch):
    monkeypatch.setattr(client.planning.report, "other_budgets", lambda _: ())  # solving takes seconds
    before = charges(hospital)
    shown = invoke(hospital.parent, "--plot", tmp_path / "plan.png", "--local-steps", 1)
    assert shown.exit_code == 0, shown
    for words in (
        "your 30 patients",
        "1 run(s)",
        "Noise multiplier 3 (given)",
        "Other rounds",
        "Time: about",
    ):
        assert words in shown.stdout
    assert (tmp_path / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert charges(hospital) == before


def test_json_is_json_alone_and_flags_are_taken(hospital):
    found = json.loads(invoke(hospital.parent, *QUICK, "--format", "json", "--rounds", 9).stdout)
    assert (found["plan"]["rounds"], found["step"], found["other_studies"]) == (9, None, [])
    assert found["spent_before"] > 0
    fresh = json.loads(invoke(hospital.parent, *QUICK, "--format", "json", "--without-ledger").stdout)
    assert fresh["spent_before"] == 0
    other = json.loads(
        invoke(hospital.parent, *QUICK, "--format", "json", "--noise-multiplier", 5, "--epsilon", 3).stdout
    )
    assert (other["mode"], other["plan"]["noise_multiplier"], other["plan"]["budget"]) == ("fixed", 5.0, 3.0)


def test_a_plan_that_would_be_refused_ends_with_1(hospital):
    refused = invoke(hospital.parent, *QUICK, "--epsilon", 0.1)
    assert refused.exit_code == 1
    assert "REFUSED" in refused.stdout


@pytest.mark.parametrize(
    "arguments",
    [("plan",), ("plan", "--patients", "0"), ("plan", "--patients", "30", "--plot", "plan.pdf")],
    ids=" ".join,
)
def test_what_cannot_be_used_ends_with_2_in_three_lines(arguments, tmp_path):
    answer = call(*arguments[:1], tmp_path, *arguments[1:])
    assert answer.returncode == 2
    assert "Traceback" not in answer.stderr
    assert len(answer.stderr.strip().splitlines()) == 3
    assert answer.stdout == ""


def test_a_damaged_ledger_ends_with_1_in_three_lines(hospital):
    (hospital.parent / "ledger" / "head.json").unlink()
    answer = call("plan", hospital.parent, *QUICK)
    assert answer.returncode == 1
    assert len(answer.stderr.strip().splitlines()) == 3
