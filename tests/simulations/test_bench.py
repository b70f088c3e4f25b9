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
from common.errors import ConfigError, FederationError
from common.models.registry import build_model
from simulations.bench import PARTS, BenchSettings, bench, full_settings, parse_parts
from simulations.bench_commands import mount
from simulations.benchmarks.cases import ALL_CASES, FIGURE_STEPS, StepCase, parse_cases
from simulations.benchmarks.compiled import why_not_compiled
from simulations.benchmarks.interleaving import interleave, spread
from simulations.benchmarks.tables import STEP_COLUMNS, other_lines, step_rows
from simulations.benchmarks.training_steps import (
    COMPILED_TWINS,
    DP,
    DP_RAGGED,
    EAGER_TWINS,
    GHOST,
    HOOKS,
    SGD,
    SGD_IN_CHUNKS,
    ways_of,
)
from tests.client.training.dp_oracle import relative_error

SCHEMA = {"dp_step", "noise", "wire", "server", "engine", "machine", "parts"}
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
TINY_SPEC = ModelSpec(name="cnn-small", channels=1, image_size=28, num_outputs=2)
TINY = BenchSettings(
    cases=parse_cases("cnn-small:28:16:ragged"),
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
    assert step["case"] == "cnn-small 28px/16 ragged"
    assert set(step) >= STEP
    assert set(content["wire"]) == {"cnn-small", "cnn"}
    machine = content["machine"]
    assert machine["threads"] == 1
    assert {"cpu", "cores", "memory_bytes", "python", "torch", "flwr", "opacus", "date"} <= set(machine)


def test_every_ratio_comes_from_its_raw_seconds(content):
    (step,), ours = content["dp_step"], DP_RAGGED
    raw = step["raw"]["seconds"]
    assert set(raw) == {*EAGER_TWINS, SGD_IN_CHUNKS, ours, HOOKS, GHOST}
    assert {len(seconds) for seconds in raw.values()} == {3}
    assert all(second > 0 for seconds in raw.values() for second in seconds)
    middle = {way: sorted(seconds)[1] for way, seconds in raw.items()}
    assert step["seconds_dp"] == middle[ours]
    assert step["seconds_sgd"] == min(middle["sgd"], middle["sgd-channels-last"]) == middle[step["twin"]]
    assert step["ratio_to_sgd"] == pytest.approx(middle[ours] / step["seconds_sgd"])
    assert step["speedup_over_hooks"] == pytest.approx(middle["hooks"] / middle[ours])
    assert step["speedup_over_ghost"] == pytest.approx(middle["ghost"] / middle[ours])
    turns = sorted(mine / other for mine, other in zip(raw[ours], raw[step["twin"]], strict=True))
    assert step["ratio_quartiles"][1] == pytest.approx(turns[1])
    assert step["rows_computed"] >= step["rows"] == 16


def test_a_case_and_its_ragged_form_share_the_alternatives(monkeypatch):
    from simulations.benchmarks import dp_step

    reason = {"reason": "not looked at"}
    monkeypatch.setattr(dp_step, "rises_of_peak", lambda _, names, **__: dict.fromkeys(names, reason))
    monkeypatch.setattr(dp_step, "free_bytes", lambda: 1)
    cases = parse_cases("cnn-small:17:8,cnn-small:17:8:ragged")
    even, ragged = dp_step.measure_steps(cases, dp_step.StepSettings(repeats=1))
    seconds, others = even["raw"]["seconds"], ragged["raw"]["seconds"]
    assert all(seconds[way] == others[way] for way in (*EAGER_TWINS, SGD_IN_CHUNKS))
    assert {*seconds} ^ {*others} == {DP, DP_RAGGED}
    for step in (even, ragged):
        assert step["memory_ratio"] is None
        assert step["memory_reason"] == "not looked at"
        # Not enough memory for Opacus: said, not tried.
        assert step["speedup_over_hooks"] is step["speedup_over_ghost"] is None
        assert "GB are free" in step["not_measured"][HOOKS]
    assert "not measured" in step_rows({"dp_step": [even]})[0]


def test_the_server_s_figures_come_from_their_raw_seconds(content):
    server = content["server"]
    assert server["bytes"] == 4 * 4 * 20_000
    assert server["throughput_ratio"] == pytest.approx(server["seconds_numpy"] / server["seconds_reduce"])
    assert min(server["seconds_spool"], server["seconds_reduce"], server["seconds_numpy"]) > 0


def test_the_noise_is_measured_beside_the_usual_one(content):
    noise, step = content["noise"], content["dp_step"][0]
    raw = noise["raw"]
    middle = {way: statistics.median(seconds) / raw["numbers"] for way, seconds in raw["seconds"].items()}
    assert set(middle) == {"torch", "torch-four", "cipher", "grid"}
    assert noise["nanoseconds"] == pytest.approx({way: 1e9 * second for way, second in middle.items()})
    assert noise["seconds_large_model"] == pytest.approx(25e6 * middle["grid"])
    parameters = sum(p.numel() for p in build_model(TINY_SPEC).parameters())
    assert step["noise_share"] == pytest.approx(parameters * middle["grid"] / step["seconds_dp"])


def test_memory_is_measured_or_its_absence_explained(content):
    for step in content["dp_step"]:
        if step["memory_ratio"] is None:
            assert step["memory_reason"]
        else:
            assert step["memory_ratio"] == step["bytes_dp"] / step["bytes_sgd"] > 0


def test_an_update_is_its_numbers_and_little_more(content):
    for size in content["wire"].values():
        assert size["bytes_float32"] == 4 * size["parameters"]
        for bits, way in size["bits"].items():
            numbers = int(bits) * size["parameters"] // 8
            assert numbers < way["bytes_arrays"] < way["bytes_message"] < 1.01 * numbers + 25_000
        assert size["bytes_message"] == size["bits"]["8"]["bytes_message"]


def test_the_engine_really_ran(content):
    engine = content["engine"]
    assert (engine["engine"], engine["hospitals"], engine["rounds"]) == ("embedded", 2, 1)
    assert 0 < engine["seconds_to_first_training_step"] < engine["seconds_command_to_result"]
    assert math.isfinite(engine["overhead_s_per_round"])
    parameters = content["wire"]["cnn-small"]["parameters"]
    assert engine["bytes_up"] > 2 * parameters  # a byte for each at least


def test_a_person_gets_every_figure_too(content):
    assert {len(row) for row in step_rows(content)} == {len(STEP_COLUMNS)}
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
    from simulations.benchmarks import training_steps

    monkeypatch.setattr(training_steps, "CLIP", 1e4)
    monkeypatch.setattr(training_steps, "NOISE_MULTIPLIER", 1e-9)
    case = StepCase.parse("cnn-small:17:6")

    def weights(model):
        return torch.cat([p.detach().double().flatten() for p in model.parameters()])

    start = weights(training_steps._model(case))
    others = (DP, HOOKS, GHOST, "sgd-channels-last", SGD_IN_CHUNKS)
    with ways_of(case, [SGD, *others]) as ways:
        for way in ways.values():
            way.step()
        moved = {name: weights(way.model) - start for name, way in ways.items()}
    assert float(moved[SGD].norm()) > 1e-4
    for name in others:
        assert relative_error(moved[name], moved[SGD]) < 1e-2, name


@pytest.mark.parametrize(
    "flags", [("--cases", "vgg:28:4"), ("--only", "dp_step,lunch"), ("--write", "pyproject.toml")]
)
def test_the_command_refuses_what_cannot_be_before_it_measures(flags):
    app = typer.Typer()
    app.callback()(lambda: None)
    mount(app)
    outcome = CliRunner().invoke(app, ["bench", *flags])
    assert isinstance(outcome.exception, ConfigError)
    assert "measuring" not in outcome.output


def test_parts_are_measured_alone_and_a_failing_one_leaves_the_others(monkeypatch):
    from simulations.benchmarks import engine

    def fail(**_):
        raise FederationError("no engine today", why="it rains")

    monkeypatch.setattr(engine, "measure_engine", fail)
    content = bench(BenchSettings(parts=parse_parts("engine,wire"), threads=1))
    assert set(content) == {"wire", "machine", "parts"}
    assert list(content["parts"]) == ["wire", "engine"]
    assert "no engine today" in content["parts"]["engine"]["failed"]
    assert "no engine today" in "\n".join(other_lines(content))


def test_a_compilation_that_takes_too_long_is_cut_short():
    found = why_not_compiled(parse_cases("cnn:28:128")[0], threads=1, timeout_s=0.1)
    assert set(found) == set(COMPILED_TWINS)
    assert all("not compiled within" in str(reason) for reason in found.values())


def test_the_page_asks_for_everything():
    settings = full_settings(threads=2)
    assert settings.parts == PARTS
    assert settings.full
    assert "cnn" in settings.compiled
    assert {case.text for case in settings.cases} >= set(FIGURE_STEPS)
    assert len(settings.cases) == 1 + 2 * len(FIGURE_STEPS)
