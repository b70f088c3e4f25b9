"""Evaluations at the server: whom it asks and when, what it believes, and what stands in the result."""

import json

import pytest
from flwr.app import ConfigRecord, MetricRecord

from common import messages
from common.errors import RefusalCode
from common.evaluation import checkpoint_rounds
from common.messages import Envelope
from server.evaluation_result import model_numbers, validation_block, validation_costs
from tests.server.fake_federation import (
    HISTOGRAMS,
    FakeGrid,
    make_config,
    result_of,
    run,
    silent,
    three_hospitals,
)

EXPECTED = {
    "accuracy": 0.85,
    "balanced_accuracy": 0.85,
    "recall": 0.9,
    "specificity": 0.8,
    "precision": 45 / 55,
}
"""By hand from 40, 10, 5, 45; every hospital says the same."""


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def lines_of(folder):
    path = folder / "evaluations.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def pairs_in_order(positives, others):
    """Share of pairs of patients, one with the finding and one without, in the right order; ties half."""
    credit = sum(
        p * n * (0.5 if high == low else high > low)
        for high, p in enumerate(positives)
        for low, n in enumerate(others)
    )
    return credit / (sum(positives) * sum(others))


def evaluations_asked(grid):
    return [m for m in grid.sent if m.metadata.message_type == messages.EVALUATE]


def when_scored(change):
    """Tamper with the answer to an evaluation only."""
    return lambda reply, request: (
        change(reply, request) if request.metadata.message_type == messages.EVALUATE else reply
    )


def with_counts(**counts):
    def change(reply, request):
        reply.content[messages.COUNTS] = MetricRecord(counts)
        return reply

    return when_scored(change)


def with_scalars(**scalars):
    def change(reply, request):
        known = dict(reply.content[messages.METRICS])
        known |= {name.replace("_", "-"): value for name, value in scalars.items()}
        left = {name: value for name, value in known.items() if value is not None}
        reply.content[messages.METRICS] = MetricRecord(left)
        return reply

    return when_scored(change)


@pytest.mark.parametrize(
    ("rounds", "checkpoints", "expected"),
    [(20, 3, (5, 10, 15)), (20, 1, (10,)), (5, 2, (1, 3)), (2, 3, (1,)), (1, 3, ()), (20, 0, ())],
)
def test_checkpoints_are_spread_evenly_before_the_end(rounds, checkpoints, expected):
    assert checkpoint_rounds(rounds, checkpoints) == expected


def test_by_default_every_hospital_is_asked_once_about_the_final_model(folder):
    hospitals = three_hospitals()
    grid = FakeGrid(hospitals)
    run(make_config(folder), grid)
    result = result_of(folder)
    assert len(evaluations_asked(grid)) == 3
    for hospital in hospitals.values():
        (envelope,) = hospital.scored
        assert envelope.key.round_number == 3
        assert envelope.key.model_hash == result["model"]["sha256"]
    found = result["validation"]
    assert {name: found[name] for name in EXPECTED} == pytest.approx(EXPECTED)
    assert found["auc"] == pytest.approx(pairs_in_order(HISTOGRAMS[:10], HISTOGRAMS[10:]))
    assert (found["round"], found["hospitals"], found["left_out"]) == (3, ["a", "b", "c"], {})
    assert (found["epsilon"], found["delta"]) == (16.0, 1e-3)
    assert 0 < found["noise"]["accuracy"] < 0.01
    assert result["validation_checkpoints"] == []
    assert [h["validation_epsilon"] for h in result["hospitals"]] == [16.0] * 3


def test_counts_are_added_so_a_hospital_weighs_by_its_patients(folder):
    hospitals = three_hospitals()
    hospitals[7].counts = {"confusion": [0.0, 50.0, 50.0, 0.0], "scores": [0.0] * 20}
    run(make_config(folder), FakeGrid(hospitals))
    assert result_of(folder)["validation"]["accuracy"] == pytest.approx((85 + 85 + 0) / 300)
    (line,) = lines_of(folder)
    assert line["counts"]["confusion"] == [80.0, 70.0, 60.0, 90.0]
    assert line["counts"]["scores"] == [2 * cell for cell in HISTOGRAMS]
    assert line["noise_variance"]["confusion"] == pytest.approx(3 * (0.3**2 * 2 + 1 / 12))


def test_hospitals_that_release_other_kinds_add_to_those(folder):
    hospitals = three_hospitals()
    hospitals[7].counts = {"confusion": [40.0, 10.0, 5.0, 45.0]}
    run(make_config(folder), FakeGrid(hospitals))
    (line,) = lines_of(folder)
    assert line["counts"]["confusion"] == [120.0, 30.0, 15.0, 135.0]
    assert line["counts"]["scores"] == [2 * cell for cell in HISTOGRAMS]
    assert line["noise_variance"]["confusion"] == pytest.approx(0.3**2 * 5 + 3 / 12)
    assert line["noise_variance"]["scores"] == pytest.approx(0.3**2 * 4 + 2 / 12)


def test_checkpoints_are_scored_and_cost_more(folder):
    grid = FakeGrid(three_hospitals())
    run(make_config(folder, evaluation={"checkpoints": 2}), grid)
    result = result_of(folder)
    assert [one["round"] for one in result["validation_checkpoints"]] == [1, 2]
    assert result["validation"]["round"] == 3
    assert result["validation"]["epsilon"] == 48.0
    assert len(evaluations_asked(grid)) == 9


def test_who_does_not_want_to_is_not_asked(folder):
    grid = FakeGrid(three_hospitals())
    run(make_config(folder, evaluation={"at-end": False}), grid)
    assert evaluations_asked(grid) == []
    assert result_of(folder)["validation"] is None
    assert lines_of(folder) == []


def test_without_any_answer_there_are_no_metrics_and_the_run_is_complete(folder):
    hospitals = three_hospitals(
        a=when_scored(silent),
        b=when_scored(lambda reply, request: refused(request, RefusalCode.METRICS)),
        c=when_scored(lambda reply, request: refused(request, RefusalCode.LATE)),
    )
    run(make_config(folder), FakeGrid(hospitals))
    result = result_of(folder)
    assert (result["status"], result["validation"]) == ("completed", None)
    complete = {h["name"]: h["validation_epsilon_complete"] for h in result["hospitals"]}
    assert complete == {"a": False, "b": True, "c": False}  # who may have charged is not known to be done
    assert [h["validation_epsilon"] for h in result["hospitals"]] == [None] * 3


def refused(request, code):
    return messages.refusal(request, Envelope.from_record(request.content), code)


def other_sender(reply, request):
    reply.metadata.__dict__["_src_node_id"] = 9
    return reply


def other_key(reply, request):
    record = reply.content[messages.ENVELOPE]
    reply.content[messages.ENVELOPE] = ConfigRecord({**record, "round": 2})
    return reply


def with_record(name):
    def change(reply, request):
        reply.content[name] = MetricRecord({"x": 1.0})
        return reply

    return change


GOOD = {"confusion": [40.0, 10.0, 5.0, 45.0], "scores": HISTOGRAMS}


@pytest.mark.parametrize(
    ("tamper", "code"),
    [
        (when_scored(other_sender), "sender"),
        (when_scored(other_key), "round-key"),
        (when_scored(with_record("extra")), "records"),
        (with_counts(**GOOD, losses=[1.0]), "counts"),
        (with_counts(), "counts"),
        (with_counts(confusion=[1.0] * 3), "counts"),
        (with_counts(confusion=[1.0] * 4, scores=[1.0] * 19), "counts"),
        (with_counts(confusion=[float("nan")] + [1.0] * 3), "counts"),
        (with_counts(confusion=[float("inf")] + [1.0] * 3), "counts"),
        (with_counts(confusion=[0.5] + [1.0] * 3), "counts"),
        (with_counts(confusion=[-50.0] + [1.0] * 3), "counts"),
        (with_counts(confusion=[1e6] + [1.0] * 3), "counts"),
        (with_counts(confusion=4.0), "counts"),
        (with_scalars(steps=3), "metrics"),
        (with_scalars(accuracy=0.9), "metrics"),
        (with_scalars(num_examples=99), "num-examples"),
        (with_scalars(noise_multiplier=None), "noise-multiplier"),
        (with_scalars(noise_multiplier=0.0), "noise-multiplier"),
        (with_scalars(noise_multiplier=1e9), "noise-multiplier"),
        (with_scalars(noise_multiplier=-1.0), "noise-multiplier"),
        (with_scalars(epsilon=None), "metrics"),
        (with_scalars(epsilon=0.1), "metrics"),
        (with_scalars(delta=None), "metrics"),
        (with_scalars(delta=1.0), "metrics"),
    ],
)
def test_an_answer_that_is_not_in_order_is_left_out(folder, tamper, code):
    run(make_config(folder), FakeGrid(three_hospitals(a=tamper)))
    found = result_of(folder)["validation"]
    assert found["left_out"] == {"a": code}
    assert found["hospitals"] == ["b", "c"]
    (line,) = lines_of(folder)
    assert line["counts"]["confusion"] == [80.0, 20.0, 10.0, 90.0]


def test_without_privacy_counts_are_exact_and_nothing_is_claimed(folder):
    run(make_config(folder, federation={"private": False}), FakeGrid(three_hospitals()))
    found = result_of(folder)["validation"]
    assert (found["epsilon"], found["delta"]) == (None, None)
    assert set(found["noise"].values()) == {0.0}
    assert [h["validation_epsilon"] for h in result_of(folder)["hospitals"]] == [None] * 3


def test_a_resumed_run_asks_no_evaluation_again(folder):
    config = make_config(folder, evaluation={"checkpoints": 2})
    hospitals = three_hospitals()
    stop = folder / "stop"

    def stop_in_round_two(reply, request):
        if request.metadata.message_type == messages.TRAIN and len(hospitals[8].asked) == 2:
            stop.touch()
            return None
        return reply

    hospitals[8].tamper = stop_in_round_two
    run(config, FakeGrid(hospitals))
    assert result_of(folder)["status"] == "stopped"
    assert [line["round"] for line in lines_of(folder)] == [1]
    assert result_of(folder)["validation"] is None
    stop.unlink(missing_ok=True)
    hospitals[8].tamper = lambda reply, request: reply
    run(config, FakeGrid(hospitals))
    assert [envelope.key.round_number for envelope in hospitals[8].scored] == [1, 2, 3]
    assert [(line["round"], line["final"]) for line in lines_of(folder)] == [
        (1, False),
        (2, False),
        (3, True),
    ]
    run(config, FakeGrid(hospitals))  # a finished run, started again to hand out its model
    assert len(hospitals[8].scored) == 3
    assert result_of(folder)["validation"]["round"] == 3


def test_an_evaluation_that_is_stopped_is_asked_again(folder):
    config, hospitals = make_config(folder), three_hospitals()

    def stop(reply, request):
        (folder / "stop").touch()
        return

    hospitals[8].tamper = when_scored(stop)
    run(config, FakeGrid(hospitals))
    assert lines_of(folder) == []
    hospitals[8].tamper = lambda reply, request: reply
    run(config, FakeGrid(hospitals))
    assert result_of(folder)["validation"]["hospitals"] == ["a", "b", "c"]


def test_what_a_hospital_left_open_is_covered_by_its_next_answer(folder):
    hospitals = three_hospitals()
    first = hospitals[8]
    first.tamper = when_scored(lambda reply, request: None if len(first.scored) == 1 else reply)
    run(make_config(folder, evaluation={"checkpoints": 2}), FakeGrid(hospitals))
    assert validation_costs(folder)["a"] == {"validation_epsilon": 48.0, "validation_epsilon_complete": True}
    assert result_of(folder)["validation_checkpoints"][0]["left_out"] == {"a": "late"}


def test_a_torn_line_and_another_model_say_nothing(folder):
    run(make_config(folder), FakeGrid(three_hospitals()))
    with (folder / "evaluations.jsonl").open("a") as file:
        file.write('{"round": 3, "fin')
    sha256 = result_of(folder)["model"]["sha256"]
    assert validation_block(folder, model_sha256=sha256)["validation"]["round"] == 3
    other = validation_block(folder, model_sha256="0" * 64)
    assert other["validation"] is None
    assert len(other["validation_checkpoints"]) == 1
    nothing = {"operating_point": None, "calibration": [], "recalibration": None}
    assert model_numbers(folder, model_sha256="0" * 64) == nothing
    fixed = model_numbers(folder, model_sha256="0" * 64, rule="0.3")["operating_point"]
    assert (fixed["threshold"], fixed["sensitivity"]) == (0.3, None)


def test_a_threshold_and_a_calibration_table_travel_with_the_model(folder):
    run(make_config(folder), FakeGrid(three_hospitals()))
    described = json.loads((folder / "model.json").read_text())
    positives, others = HISTOGRAMS[:10], HISTOGRAMS[10:]
    youden = {
        edge / 10: sum(positives[edge:]) / sum(positives) - sum(others[edge:]) / sum(others)
        for edge in range(1, 10)
    }
    assert described["operating_point"]["threshold"] == max(youden, key=youden.get)
    assert [row["observed"] for row in described["calibration"]][-3:] == pytest.approx(
        [p / (p + n) for p, n in zip(positives[-3:], others[-3:], strict=True)]
    )


def test_a_hospital_that_left_for_its_budget_may_still_score_the_model(folder):
    def spent(reply, request):
        if request.metadata.message_type == messages.TRAIN:
            return refused(request, RefusalCode.BUDGET)
        return reply

    run(make_config(folder), FakeGrid(three_hospitals(c=spent)))
    result = result_of(folder)
    assert result["status"] == "completed"
    assert result["validation"]["hospitals"] == ["a", "b", "c"]
