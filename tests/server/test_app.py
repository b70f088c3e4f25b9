"""The real ServerApp against hospitals of numpy: from hello to the closing exchange."""

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest

from common import messages
from common.parameters import parameters_sha256, template_of
from server.outsider import SEVERAL_STEPS
from tests.server.fake_federation import (
    TEMPLATE,
    FakeGrid,
    arrays_in,
    assert_same_bits,
    fedavg_by_hand,
    in_round,
    make_config,
    metrics_of,
    model_of,
    outcomes,
    result_of,
    run,
    three_hospitals,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def test_a_run_is_fedavg_and_leaves_everything(folder):
    hospitals = three_hospitals()
    run(make_config(folder), FakeGrid(hospitals))
    result = result_of(folder)
    assert result["status"] == "completed"
    assert result["rounds"] == 3
    assert result["private"] is True
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3))
    assert result["model"]["sha256"] == parameters_sha256(model_of(folder))
    assert result["model"]["parameters"] == 15
    assert [h["name"] for h in result["hospitals"]] == ["a", "b", "c"]
    assert result["hospitals"][2] == {
        "name": "c",
        "enrolled_patients": 300,
        "epsilon": 1.5,
        "delta": 1e-3,
        "epsilon_complete": True,
        "epsilon_understated": False,
        "epsilon_outsider": 1.5,
        "epsilon_outsider_proven": False,
        "epsilon_outsider_reason": SEVERAL_STEPS,
        "validation_epsilon": 16.0,
        "validation_epsilon_complete": True,
        "noise_multiplier": 4.0,
        "sample_rate": 0.5,
        "steps": 6,
        "rounds": 3,
        "releases": 3,
        "model_received": True,
        "test": {},
    }
    assert result["wire"]["bytes_up_float32"] == 9 * 4 * 15
    assert result["wire"]["bytes_up"] > 9 * 4 * 15
    assert 0 <= result["time"]["overhead_s_per_round"] < 1
    assert result["time"]["wall_s"] > 0


def test_every_hospital_gets_the_final_model_with_its_description(folder):
    grid = FakeGrid(three_hospitals())
    run(make_config(folder), grid)
    closing = [m for m in grid.sent if m.metadata.message_type == messages.CLOSING]
    assert {m.metadata.dst_node_id for m in closing} == {7, 8, 9}
    for message in closing:
        record = message.content[messages.MODEL]
        assert json.loads(record["json"])["classes"] == ["negative", "positive"]
        assert json.loads(record["json"])["sha256"] == record["sha256"]
        assert record["card"].startswith("# Model card")
        arrays = arrays_in(message.content)
        assert parameters_sha256(arrays) == record["sha256"] == result_of(folder)["model"]["sha256"]


def test_arrival_order_does_not_matter(tmp_path):
    hashes = set()
    for number, order in enumerate(itertools.permutations([7, 8, 9])):
        folder = tmp_path / f"order{number}" / "run"
        folder.parent.mkdir()

        def one_by_one(ready, order=order):
            return sorted(ready, key=lambda m: order.index(m.metadata.src_node_id))[:1]

        run(make_config(folder, federation={"rounds": 2}), FakeGrid(three_hospitals(), arrival=one_by_one))
        hashes.add(result_of(folder)["model"]["sha256"])
    assert len(hashes) == 1


def test_without_privacy_nothing_is_claimed(folder):
    run(make_config(folder, federation={"private": False}), FakeGrid(three_hospitals()))
    result = result_of(folder)
    assert result["private"] is False
    for hospital in result["hospitals"]:
        assert [hospital[k] for k in ("epsilon", "delta", "noise_multiplier", "sample_rate")] == [None] * 4
    assert {line["epsilon"] for line in metrics_of(folder) if "hospital" in line} == {None}
    assert json.loads((folder / "model.json").read_text())["privacy"] == {"private": False, "epsilon": None}


def test_a_reproducible_run_is_not_private(folder):
    run(make_config(folder, federation={"reproducible": True}), FakeGrid(three_hospitals()))
    assert (result_of(folder)["status"], result_of(folder)["private"]) == ("completed", False)
    first = result_of(folder)["hospitals"][0]
    assert (first["epsilon"], first["steps"], first["rounds"]) == (None, 6, 3)


def test_hospitals_may_come_and_go(folder):
    hospitals = three_hospitals()
    grid = FakeGrid(dict(hospitals))
    late = grid.hospitals.pop(7)

    def arrive(reply, request):
        grid.hospitals[7] = late
        return reply

    hospitals[8].tamper = in_round(1, arrive)
    run(make_config(folder, runtime={"expected-hospitals": 2}), grid)
    assert set(outcomes(folder, 1)) == {"a", "b"}
    assert set(outcomes(folder, 2)) == {"a", "b", "c"}
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3, without={1: {"c"}}))


def test_messages_hold_what_the_contract_names_and_nothing_else(folder):
    grid = FakeGrid(three_hospitals())
    run(make_config(folder), grid)
    records = {message.metadata.message_type: set(message.content) for message in grid.sent}
    assert records == {
        messages.HELLO: {"envelope"},
        messages.TRAIN: {"envelope", "arrays", "request"},
        messages.EVALUATE: {"envelope", "arrays", "request"},
        messages.CLOSING: {"envelope", "arrays", "model"},
    }
    for message in grid.sent:
        if message.metadata.message_type == messages.TRAIN:
            assert message.metadata.ttl == 5.0
            assert not any("server" in key or "runtime" in key for key in message.content["request"])
            assert template_of(arrays_in(message.content)) == TEMPLATE


def test_a_hospital_silent_at_the_closing_is_noted_and_no_failure(folder):
    def deaf_at_the_end(reply, request):
        return None if request.metadata.message_type == messages.CLOSING else reply

    run(make_config(folder), FakeGrid(three_hospitals(b=deaf_at_the_end)))
    received = {h["name"]: h["model_received"] for h in result_of(folder)["hospitals"]}
    assert result_of(folder)["status"] == "completed"
    assert received == {"a": True, "b": False, "c": True}


def test_the_server_imports_no_torch():
    code = "import sys, server.app; sys.exit('torch' in sys.modules or 'matplotlib' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60, check=False).returncode == 0
