"""Every way a run ends, and how it goes on."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import CheckpointError, ConfigError, FederationError, RefusalCode
from tests.server.fake_federation import (
    FakeGrid,
    assert_same_bits,
    error_reply,
    fedavg_by_hand,
    in_round,
    make_config,
    metrics_of,
    model_of,
    outcomes,
    refuse,
    result_of,
    run,
    three_hospitals,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_quorum_lost_keeps_the_checkpoint_and_says_so(folder):
    crashing = {name: in_round(2, error_reply) for name in ("a", "b")}
    run(make_config(folder), FakeGrid(three_hospitals(**crashing)))
    assert result_of(folder)["status"] == "quorum-lost"
    assert result_of(folder)["rounds"] == 1
    assert (folder / "checkpoints" / "1" / "manifest.json").is_file()
    assert outcomes(folder, 2) == {
        "a": ("failed", "flower-2"),
        "b": ("failed", "flower-2"),
        "c": ("aggregated", None),
    }


def test_within_the_patience_failed_hospitals_are_asked_again_with_the_same_key(folder):
    failures = iter([True, True])

    def fail_twice(reply, request):
        return error_reply(reply, request) if next(failures, False) else reply

    hospitals = three_hospitals(a=in_round(2, fail_twice), b=in_round(2, error_reply))
    run(make_config(folder, server={"patience-s": 5.0}), FakeGrid(hospitals))
    assert result_of(folder)["status"] == "completed"
    keys = [envelope.key for envelope in hospitals[8].asked if envelope.key.round_number == 2]
    assert len(keys) == 3
    assert len(set(keys)) == 1
    assert len([e for e in hospitals[7].asked if e.key.round_number == 2]) == 1
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3, without={2: {"b"}}))


def test_too_few_hospitals_for_the_quorum_end_the_run(folder):
    run(make_config(folder, server={"quorum": 4}), FakeGrid(three_hospitals()))
    assert (result_of(folder)["status"], result_of(folder)["rounds"]) == ("quorum-lost", 0)
    assert [(h["name"], h["rounds"]) for h in result_of(folder)["hospitals"]] == [
        ("a", 0),
        ("b", 0),
        ("c", 0),
    ]


def test_a_refusal_repeated_within_the_patience_is_told_once(folder, caplog):
    stubborn = dict.fromkeys("abc", in_round(1, refuse(RefusalCode.POLICY)))
    grid = FakeGrid(three_hospitals(**stubborn))
    run(make_config(folder), grid)
    assert result_of(folder)["status"] == "quorum-lost"
    assert len(grid.sent) > 3 + 2 * 3
    assert caplog.text.count("a is left out: refused (policy)") == 1


def test_a_hospital_without_budget_is_not_asked_again(folder):
    spent = in_round(2, refuse(RefusalCode.BUDGET))
    hospitals = three_hospitals(b=spent)
    run(make_config(folder), FakeGrid(hospitals))
    assert outcomes(folder, 2)["b"] == ("refused", "budget-spent")
    assert set(outcomes(folder, 3)) == {"a", "c"}
    assert result_of(folder)["status"] == "completed"
    assert hospitals[9].model is not None


def test_when_all_budgets_are_spent_the_run_ends_with_a_model(folder):
    spent = in_round(2, refuse(RefusalCode.BUDGET))
    hospitals = three_hospitals(a=spent, b=spent, c=spent)
    run(make_config(folder, server={"patience-s": 60.0}), FakeGrid(hospitals))
    result = result_of(folder)
    assert (result["status"], result["rounds"]) == ("budget-exhausted", 1)
    assert all(hospital["model_received"] for hospital in result["hospitals"])


SERVER_OPTIMIZERS = [
    {"optimizer": "plain", "ema-decay": 0.5, "final-model": "ema"},
    {"optimizer": "momentum", "momentum": 0.9},
    {"optimizer": "adam", "learning-rate": 0.05, "ema-decay": 0.9},
]


@pytest.mark.parametrize("server", SERVER_OPTIMIZERS, ids=lambda server: server["optimizer"])
def test_a_run_that_broke_and_resumed_ends_with_the_same_bytes(tmp_path, server):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    federation = {"rounds": 5}
    run(make_config(whole, federation=federation, server=server), FakeGrid(three_hospitals()))

    def power_cut(reply, request):
        raise RuntimeError("power cut")

    cut = FakeGrid(three_hospitals(b=in_round(3, power_cut)))
    with pytest.raises(RuntimeError, match="power cut"):
        run(make_config(broken, federation=federation, server=server), cut)
    assert result_of(broken)["status"] == "failed"
    assert result_of(broken)["rounds"] == 2
    hospitals = three_hospitals()
    run(make_config(broken, federation=federation, server=server), FakeGrid(hospitals))
    assert [e.key.round_number for e in hospitals[7].asked] == [3, 4, 5]
    assert (broken / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert result_of(broken)["status"] == "completed"
    assert [line["round"] for line in metrics_of(broken) if "closed" in line] == [1, 2, 3, 4, 5]
    assert [h["rounds"] for h in result_of(broken)["hospitals"]] == [5, 5, 5]


def test_a_server_killed_in_a_round_goes_on_with_the_same_bytes(tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    run(make_config(whole), FakeGrid(three_hospitals()))
    script = (
        "import os, signal, sys; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from tests.server.fake_federation import *\n"
        "def die(reply, request): os.kill(os.getpid(), signal.SIGKILL)\n"
        f"config = make_config(Path({str(killed)!r}))\n"
        "run(config, FakeGrid(three_hospitals(b=in_round(2, die))))\n"
    )
    child = subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False, timeout=60)
    assert child.returncode == -9
    assert not (killed / "result.json").exists()
    run(make_config(killed), FakeGrid(three_hospitals()))
    assert (killed / "model.safetensors").read_bytes() == (whole / "model.safetensors").read_bytes()
    assert [line["round"] for line in metrics_of(killed) if "closed" in line] == [1, 2, 3]


def test_a_resumed_run_asks_with_its_own_run_id(folder):
    federation = {"rounds": 2}
    hospitals = three_hospitals()
    (folder).mkdir()

    def stop_now(reply, request):
        (folder / "stop").touch()
        return reply

    hospitals[7].tamper = in_round(1, stop_now)
    run(make_config(folder, federation=federation), FakeGrid(hospitals))
    assert result_of(folder)["status"] == "stopped"
    again = three_hospitals()
    run(make_config(folder, federation=federation), FakeGrid(again))
    assert result_of(folder)["status"] == "completed"
    assert {e.key.run_id for e in again[7].asked} == {e.key.run_id for e in hospitals[7].asked}


def test_a_stop_abandons_the_open_round_at_once_and_can_be_resumed(folder):
    def stop_and_keep_silent(reply, request):
        (folder / "stop").touch()

    slow = three_hospitals(a=in_round(2, stop_and_keep_silent))
    began = time.monotonic()
    run(make_config(folder, server={"deadline-s": 600.0}), FakeGrid(slow))
    assert time.monotonic() - began < 5
    assert (result_of(folder)["status"], result_of(folder)["rounds"]) == ("stopped", 1)
    assert not (folder / "stop").exists()
    assert {line["round"] for line in metrics_of(folder)} == {1}
    hospitals = three_hospitals()
    run(make_config(folder), FakeGrid(hospitals))
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3))


def test_a_damaged_newest_checkpoint_is_passed_over(folder, caplog):
    run(make_config(folder), FakeGrid(three_hospitals()))
    expected = (folder / "model.safetensors").read_bytes()
    file = folder / "checkpoints" / "3" / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-3] ^= 1
    file.write_bytes(content)
    hospitals = three_hospitals()
    run(make_config(folder), FakeGrid(hospitals))
    assert "checkpoint 3 is passed over: model.safetensors does not match its hash" in caplog.text
    assert [e.key.round_number for e in hospitals[7].asked] == [3]
    assert (folder / "model.safetensors").read_bytes() == expected
    assert [line["round"] for line in metrics_of(folder) if "closed" in line] == [1, 2, 3]


def test_when_no_checkpoint_is_whole_nothing_is_trained(folder):
    run(make_config(folder), FakeGrid(three_hospitals()))
    for manifest in folder.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    hospitals = three_hospitals()
    with pytest.raises(CheckpointError):
        run(make_config(folder), FakeGrid(hospitals))
    assert hospitals[7].asked == []


def test_the_plan_of_a_run_cannot_be_changed(folder):
    run(make_config(folder), FakeGrid(three_hospitals()))
    before = (folder / "config.toml").read_text()
    with pytest.raises(ConfigError, match=r"training\.learning-rate"):
        run(make_config(folder, training={"learning-rate": 0.1}), FakeGrid(three_hospitals()))
    assert (folder / "config.toml").read_text() == before


def test_only_one_server_writes_a_run_folder(folder):
    script = (
        "import sys, time; sys.path.insert(0, '.')\n"
        "from pathlib import Path\n"
        "from server.run_folder import open_run_folder\n"
        "from tests.server.fake_federation import make_config\n"
        f"with open_run_folder(make_config(Path({str(folder)!r}))):\n"
        "    print('locked', flush=True); sys.stdin.read()\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with holder:
        assert holder.stdout.readline() == "locked\n"
        with pytest.raises(FederationError, match="in use"):
            run(make_config(folder), FakeGrid(three_hospitals()))
        assert not (folder / "result.json").exists()
        holder.kill()
    run(make_config(folder), FakeGrid(three_hospitals()))
    assert result_of(folder)["status"] == "completed"


def test_a_new_attempt_is_asked_for_by_file(folder):
    folder.mkdir()
    (folder / "attempt").write_text("2\n")
    hospitals = three_hospitals()
    run(make_config(folder), FakeGrid(hospitals))
    assert {envelope.key.attempt for envelope in hospitals[7].asked} == {2}


def test_a_model_that_diverges_ends_the_run_and_keeps_the_last_checkpoint(folder):
    config = make_config(folder, server={"learning-rate": 1e42})
    with pytest.raises(FederationError, match="not finite"):
        run(config, FakeGrid(three_hospitals()))
    assert (result_of(folder)["status"], result_of(folder)["rounds"]) == ("failed", 0)
    assert (folder / "checkpoints" / "0" / "manifest.json").is_file()
