"""Hospitals that wait for a person there: asked again seldom, and at the end of a run waited for."""

import json
import time
from itertools import pairwise

import pytest

from common import messages
from common.errors import RefusalCode
from server.collection import approval_pause
from tests.server.fake_federation import (
    FakeGrid,
    in_round,
    make_config,
    refuse,
    result_of,
    run,
    silent,
    three_hospitals,
)


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def lines_of(folder):
    path = folder / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def when_scored(change):
    """Tamper with the answer to an evaluation only."""
    return lambda reply, request: (
        change(reply, request) if request.metadata.message_type == messages.EVALUATE else reply
    )


def test_who_waits_for_a_person_is_asked_again_seldom_and_the_others_at_the_usual_pace(folder):
    def approved_at_the_third(reply, request):
        is_waiting = len(hospitals[8].asked) < 3
        return refuse(RefusalCode.APPROVAL)(reply, request) if is_waiting else reply

    def broken_at_first(reply, request):
        return refuse(RefusalCode.DATA)(reply, request) if len(hospitals[9].asked) < 4 else reply

    hospitals = three_hospitals(a=in_round(1, approved_at_the_third), b=in_round(1, broken_at_first))
    grid = FakeGrid(hospitals)
    server = {"quorum": 3, "patience-s": 2.4}
    began = time.monotonic()
    run(make_config(folder, federation={"rounds": 1}, server=server), grid)
    assert result_of(folder)["status"] == "completed"
    asked = [m for m in grid.sent if m.metadata.message_type == messages.TRAIN]
    by_name = {h.name: [m for m in asked if m.metadata.dst_node_id == node] for node, h in hospitals.items()}
    assert {name: len(times) for name, times in by_name.items()} == {"a": 3, "b": 4, "c": 1}
    times = [m.metadata.created_at for m in by_name["a"]]
    assert min(later - earlier for earlier, later in pairwise(times)) >= 1.2
    assert by_name["b"][-1].metadata.created_at - times[0] < 1.2
    assert time.monotonic() - began < 5


def test_a_day_of_patience_means_a_question_a_minute():
    assert [approval_pause(patience_s) for patience_s in (10.0, 120.0, 86_400.0)] == [5.0, 60.0, 60.0]


def pending_until(number, hospital):
    """A person approves in time for the answer to the question of this number."""
    return when_scored(
        lambda reply, request: (
            refuse(RefusalCode.APPROVAL)(reply, request) if len(hospital().scored) < number else reply
        )
    )


WAITING = {"patience-s": 0.8, "deadline-s": 0.9}
"""Who waits for a person is asked twice: at once and after 0.4 s."""


def test_who_waits_for_a_person_at_the_end_is_asked_again(folder):
    hospitals = three_hospitals(a=pending_until(2, lambda: hospitals[8]), c=when_scored(silent))
    run(make_config(folder, server=WAITING), FakeGrid(hospitals))
    found = result_of(folder)["validation"]
    assert (found["hospitals"], found["left_out"]) == (["a", "b"], {"c": "late"})
    assert [len(hospitals[node].scored) for node in (8, 9, 7)] == [2, 1, 1]
    assert [line["hospitals"]["a"]["code"] for line in lines_of(folder)] == [None]


def test_who_is_never_approved_is_waited_for_within_the_patience_only(folder, caplog):
    hospitals = three_hospitals(a=pending_until(99, lambda: hospitals[8]))
    began = time.monotonic()
    run(make_config(folder, server=WAITING), FakeGrid(hospitals))
    assert time.monotonic() - began < 3
    assert len(hospitals[8].scored) == 2
    result = result_of(folder)
    assert (result["status"], result["validation"]["left_out"]) == ("completed", {"a": "approval-pending"})
    assert caplog.text.count("a gives no counts") == 1


def test_a_checkpoint_does_not_hold_up_the_training_for_an_approval(folder):
    hospitals = three_hospitals(a=pending_until(99, lambda: hospitals[8]))
    config = make_config(folder, server=WAITING, evaluation={"checkpoints": 1, "at-end": False})
    began = time.monotonic()
    run(config, FakeGrid(hospitals))
    assert time.monotonic() - began < 0.8
    assert len(hospitals[8].scored) == 1


def test_a_stop_ends_the_waiting_and_the_next_start_asks_again(folder):
    def stop(reply, request):
        (folder / "stop").touch()
        return refuse(RefusalCode.APPROVAL)(reply, request)

    hospitals = three_hospitals(a=when_scored(stop))
    config = make_config(folder, server=WAITING)
    run(config, FakeGrid(hospitals))
    assert lines_of(folder) == []
    hospitals[8].tamper = lambda reply, request: reply
    run(config, FakeGrid(hospitals))
    assert result_of(folder)["validation"]["hospitals"] == ["a", "b", "c"]
