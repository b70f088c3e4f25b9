"""The benchmark measures what it says; how fast anything is, is for the benchmark to say."""

import itertools
import json
import math
import statistics

import pytest
import torch
import typer
from typer.testing import CliRunner

from common.config import ModelSpec
from common.errors import ConfigError
from common.models.registry import build_model
from simulations.bench import STEP_COLUMNS, BenchSettings, bench, other_lines, step_rows
from simulations.bench_commands import mount
from simulations.benchmarks.cases import ALL_CASES, StepCase, parse_cases
from simulations.benchmarks.dp_step import DP, HOOKS, SGD, spread, steps_of
from simulations.benchmarks.interleaving import interleave
from tests.client.training.dp_oracle import relative_error

SCHEMA = {"dp_step", "noise", "wire", "server", "engine", "machine"}
STEP = {
    "case",
    "seconds_sgd",
    "seconds_dp",
    "ratio_to_sgd",
    "speedup_over_hooks",
    "speedup_over_ghost",
    "memory_ratio",
    "noise_share",
}
TINY_SPEC = ModelSpec(name="cnn-small", channels=1, image_size=17, num_outputs=2)
TINY = BenchSettings(
    cases=parse_cases("cnn-small:17:8:ragged"),
    threads=1,
    repeats=3,
    updates=4,
    update_parameters=20_000,
    engine_hospitals=2,
    engine_rounds=1,
)


@pytest.fixture(scope="module")
def content():
    return bench(TINY)


def test_the_content_has_the_promised_form(content):
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert set(content) == SCHEMA
    (step,) = content["dp_step"]
    assert set(step) >= STEP
    assert step["case"] == "cnn-small 17px/8 ragged"
    assert set(content["wire"]) == {"cnn-small", "cnn"}
    machine = content["machine"]
    assert machine["threads"] == 1
    assert {"cpu", "cores", "memory_bytes", "python", "torch", "flwr", "opacus", "date"} <= set(machine)


def test_every_figure_comes_from_its_raw_seconds(content):
    (step,) = content["dp_step"]
    raw = step["raw"]["seconds"]
    assert {len(seconds) for seconds in raw.values()} == {3}
    assert all(second > 0 for seconds in raw.values() for second in seconds)
    middle = {way: sorted(seconds)[1] for way, seconds in raw.items()}
    assert step["seconds_dp"] == middle["dp"]
    assert step["seconds_sgd"] == min(middle["sgd"], middle["sgd-channels-last"])
    assert step["ratio_to_sgd"] == pytest.approx(middle["dp"] / step["seconds_sgd"])
    assert step["speedup_over_hooks"] == pytest.approx(middle["hooks"] / middle["dp"])
    assert step["speedup_over_ghost"] == pytest.approx(middle["ghost"] / middle["dp"])
    server = content["server"]
    assert server["bytes"] == 4 * 4 * 20_000
    assert server["throughput_ratio"] == pytest.approx(server["seconds_numpy"] / server["seconds_reduce"])
    assert min(server["seconds_spool"], server["seconds_reduce"], server["seconds_numpy"]) > 0


def test_the_noise_is_measured_beside_the_usual_one(content):
    noise, (step,) = content["noise"], content["dp_step"]
    raw = noise["raw"]
    middle = {way: statistics.median(seconds) / raw["numbers"] for way, seconds in raw["seconds"].items()}
    assert set(middle) == {"torch", "torch-four", "cipher", "grid"}
    assert noise["nanoseconds"] == pytest.approx({way: 1e9 * second for way, second in middle.items()})
    assert noise["seconds_large_model"] == pytest.approx(25e6 * middle["grid"])
    parameters = sum(p.numel() for p in build_model(TINY_SPEC).parameters())
    assert step["noise_share"] == pytest.approx(parameters * middle["grid"] / step["seconds_dp"])


def test_memory_is_measured_or_its_absence_explained(content):
    (step,) = content["dp_step"]
    if step["memory_ratio"] is None:
        assert step["memory_reason"]
    else:
        assert step["memory_ratio"] == step["bytes_dp"] / step["bytes_sgd"] > 0


def test_an_update_is_its_numbers_and_little_more(content):
    for size in content["wire"].values():
        assert size["bytes_float32"] == 4 * size["parameters"]
        assert size["bytes_float32"] < size["bytes_arrays"] < size["bytes_message"]
        assert size["bytes_message"] < size["bytes_float32"] + 8_000


def test_the_engine_really_ran(content):
    engine = content["engine"]
    assert (engine["engine"], engine["hospitals"], engine["rounds"]) == ("embedded", 2, 1)
    assert 0 < engine["seconds_to_first_training_step"] < engine["seconds_command_to_result"]
    assert math.isfinite(engine["overhead_s_per_round"])
    parameters = content["wire"]["cnn-small"]["parameters"]
    assert engine["bytes_up"] > 2 * 4 * parameters


def test_a_person_gets_every_figure_too(content):
    (row,) = step_rows(content)
    assert len(row) == len(STEP_COLUMNS)
    shown = "\n".join(other_lines(content))
    assert all(word in shown for word in ("noise", "update", "server", "engine", "machine"))


def test_a_busy_machine_is_said(content):
    assert spread([1.0, 1.0, 1.1, 1.0, 1.1]) < 1.2
    assert spread([1.0, 1.0, 1.1, 3.0, 4.0]) > 1.5
    assert spread([2.0]) == 1
    for value, said in ((1.1, False), (3.0, True)):
        steps = [content["dp_step"][0] | {"spread": value}]
        assert ("measure again" in "".join(other_lines(content | {"dp_step": steps}))) == said


def test_ways_take_turns_and_each_begins_one():
    order, ticks = [], itertools.count()
    ways = {name: (lambda name=name: order.append(name)) for name in "abc"}
    seconds = interleave(ways, repeats=4, warm_up=1, clock=lambda: float(next(ticks)))
    assert "".join(order) == "abc" + "abc" + "bca" + "cab" + "abc"
    assert seconds == {name: [1.0] * 4 for name in "abc"}


def test_a_spent_budget_ends_a_case_but_not_before_enough_turns():
    now = itertools.count(step=10)
    seconds = interleave(
        {"a": lambda: None}, repeats=50, warm_up=0, at_least=3, budget_s=1.0, clock=lambda: float(next(now))
    )
    assert len(seconds["a"]) == 3


@pytest.mark.parametrize(("ways", "repeats"), [({}, 3), ({"a": int}, 0)])
def test_nothing_to_measure_is_refused(ways, repeats):
    with pytest.raises(ValueError, match="nothing to measure"):
        interleave(ways, repeats=repeats)


def test_cases_are_read_and_written():
    case = StepCase.parse("resnet18:64:32:ragged")
    assert (case.model, case.image_size, case.batch_size, case.ragged) == ("resnet18", 64, 32, True)
    assert StepCase.parse(case.text) == case
    assert [case.name for case in parse_cases("default")] == ["cnn-small 28px/128", "cnn 28px/128"]
    assert ",".join(case.text for case in parse_cases("all")) == ALL_CASES


@pytest.mark.parametrize("text", ["", "cnn", "cnn:28", "cnn:8:4", "cnn:28:0", "vgg:28:4", "cnn:28:4:odd"])
def test_an_impossible_case_is_refused(text):
    with pytest.raises(ConfigError, match="--cases"):
        parse_cases(text)


@pytest.mark.filterwarnings("ignore::UserWarning")  # of Opacus about its own hooks
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_all_ways_do_the_work_that_is_timed(monkeypatch):
    """Without noise and clipping every way takes the same step as plain SGD: none of them skips work."""
    from simulations.benchmarks import dp_step

    built = []
    real = dp_step._model
    monkeypatch.setattr(dp_step, "_model", lambda case: built.append(real(case)) or built[-1])
    monkeypatch.setattr(dp_step, "CLIP", 1e4)
    monkeypatch.setattr(dp_step, "NOISE_MULTIPLIER", 1e-9)
    case = StepCase.parse("cnn-small:17:6")

    def weights(model):
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])

    start = weights(real(case))
    with steps_of(case) as steps:
        for step in steps.values():
            step()
        moved = dict(zip(steps, [weights(model) - start for model in built], strict=True))
    assert float(moved[SGD].norm()) > 1e-4
    for way in (DP, HOOKS, "ghost", "sgd-channels-last"):
        assert relative_error(moved[way], moved[SGD]) < 1e-2, way


def test_the_command_refuses_an_impossible_case_before_it_measures():
    app = typer.Typer()
    app.callback()(lambda: None)
    mount(app)
    outcome = CliRunner().invoke(app, ["bench", "--cases", "vgg:28:4"])
    assert isinstance(outcome.exception, ConfigError)
    assert "measuring" not in outcome.output
