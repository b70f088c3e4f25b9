"""`flower-simulate compare`: the arithmetic against slow oracles, the pages, and one real comparison."""

import io
import json
import re
import threading
import time
from html.parser import HTMLParser

import numpy as np
import pytest
from typer.testing import CliRunner

from common import metrics
from common.errors import ConfigError
from simulations.baselines.classifiers import METHODS
from simulations.cli import app
from simulations.compare import compare
from simulations.compare_commands import chosen_epsilons
from simulations.comparison import (
    RESAMPLES,
    SCORES,
    Trained,
    interval_of,
    rows_of,
    score,
    to_dict,
    verdicts_of,
)
from simulations.comparison_page import findings, markdown, terminal_table, write_comparison
from simulations.scenario import Scenario, make_scenario
from simulations.ways import ways_to_compare

HEAD = {
    "data": {"name": "films", "classes": ["a", "b"], "unit": "patient", "generated": True},
    "seed": 0,
    "reproducible": False,
    "model": "cnn-small",
    "partition": "iid",
    "hospitals": [{"name": "x", "enrolled_patients": 10}, {"name": "y", "enrolled_patients": 10}],
    "left_out": [{"name": "z", "reason": "it has 1 patient, at least 4 are needed"}],
    "test": {"images": 200, "units": 100},
}


def draw_test_set(rng, *, rows=200, units=100):
    return rng.integers(2, size=rows), np.sort(rng.integers(units, size=rows))


def said_with_skill(targets, skill, rng):
    positive = 1 / (1 + np.exp(-(skill * (2 * targets - 1) + rng.normal(size=len(targets)))))
    return np.stack([1 - positive, positive], axis=1)


def trained(way, skill, rng, targets, units, **more):
    values, samples = score(said_with_skill(targets, skill, rng), targets, units, seed=0)
    ci95 = {name: interval_of(drawn) for name, drawn in samples.items()}
    facts = {"status": "completed", "rounds": 5, "seconds": 2.0, "metrics": values, "ci95": ci95}
    return Trained(way=way, samples=samples, **(facts | more))


def example(federated_skill=1.0, alone_skills=(0.3, 0.6), private_skill=0.1):
    rng = np.random.default_rng(7)
    targets, units = draw_test_set(rng)
    ways = ways_to_compare(["x", "y"], epsilons=(3.0,))
    skills = dict(zip(ways, (1.2, *alone_skills, federated_skill, private_skill), strict=True))
    return [trained(way, skill, rng, targets, units) for way, skill in skills.items()]


def test_ways_are_central_alone_federated_and_federated_at_each_epsilon():
    titles = [way.title for way in ways_to_compare(["x", "y"], epsilons=(1.0, 8.0))]
    assert titles == [
        "central",
        "x alone",
        "y alone",
        "federated",
        "federated, epsilon 1",
        "federated, epsilon 8",
    ]
    more = ways_to_compare(["x", "y"], epsilons=(1.0, 8.0), alone_private=True)
    assert [way.title for way in more if way.kind == "alone" and way.epsilon] == [
        "x alone, epsilon 1",
        "y alone, epsilon 1",
        "x alone, epsilon 8",
        "y alone, epsilon 8",
    ]
    names = [way.name for way in more]
    assert len(set(names)) == len(names)
    assert "alone-x-epsilon-8" in names


def test_intervals_are_those_of_the_metrics_module():
    rng = np.random.default_rng(3)
    targets, units = draw_test_set(rng)
    said = said_with_skill(targets, 0.7, rng)
    values, samples = score(said, targets, units, seed=5)
    expected = metrics.bootstrap_ci(said, targets, units=units, resamples=RESAMPLES, seed=5)
    assert {name: interval_of(samples[name]) for name in SCORES} == expected
    assert values == {name: metrics.classification_metrics(said, targets)[name] for name in SCORES}


def test_pairs_draw_the_same_patients_for_every_model():
    rng = np.random.default_rng(4)
    targets, units = draw_test_set(rng)
    said = said_with_skill(targets, 0.7, rng)
    _, one = score(said, targets, units, seed=0)
    # Another model with the same order of rows: its AUC is the same in every draw.
    _, other = score(said**3 / (said**3).sum(axis=1, keepdims=True), targets, units, seed=0)
    np.testing.assert_allclose(one["auc"] - other["auc"], 0, atol=1e-12)
    _, another_draw = score(said, targets, units, seed=1)
    assert np.abs(one["auc"] - another_draw["auc"]).max() > 0.01


def test_paired_difference_agrees_with_a_slow_bootstrap_of_whole_patients():
    rng = np.random.default_rng(5)
    targets, units = draw_test_set(rng)
    good, poor = said_with_skill(targets, 1.0, rng), said_with_skill(targets, 0.4, rng)
    difference = score(good, targets, units, seed=0)[1]["auc"] - score(poor, targets, units, seed=0)[1]["auc"]
    rows_of_unit = [np.flatnonzero(units == unit) for unit in np.unique(units)]
    slow = []
    for _ in range(400):
        drawn = np.concatenate(
            [rows_of_unit[i] for i in rng.integers(len(rows_of_unit), size=len(rows_of_unit))]
        )
        slow.append(metrics.auc(good[drawn], targets[drawn]) - metrics.auc(poor[drawn], targets[drawn]))
    assert np.mean(difference) == pytest.approx(np.mean(slow), abs=0.01)
    assert np.std(difference) == pytest.approx(np.std(slow), rel=0.15)


def test_table_has_the_ways_and_mean_best_and_worst_of_the_hospitals_alone():
    items = example()
    rows = rows_of(items)
    assert [row.title for row in rows] == [
        "central",
        "alone, mean of 2",
        "alone, best (y)",
        "alone, worst (x)",
        "x alone",
        "y alone",
        "federated",
        "federated, epsilon 3",
    ]
    alone = [item.metrics["auc"] for item in items[1:3]]
    assert rows[1].metrics["auc"] == pytest.approx(np.mean(alone))
    assert rows[2].metrics["auc"] == max(alone)
    assert rows[3].metrics["auc"] == min(alone)
    low, high = rows[1].ci95["auc"]
    assert low < rows[1].metrics["auc"] < high


def test_verdict_says_when_the_federation_beats_its_members():
    verdicts = {(v.way, v.against): v for v in verdicts_of(example(federated_skill=3.0))}
    best = verdicts["federated", "the best hospital alone (y)"]
    assert best.beats
    assert best.ci95[0] > 0
    assert best.text.startswith("federated beats the best hospital alone (y): AUC difference .")


def test_verdict_says_plainly_when_it_does_not():
    items = example(federated_skill=0.6, alone_skills=(0.6, 0.6), private_skill=-1.0)
    lines = findings(items)
    assert lines[0].startswith("On these data the federation does not pay")
    assert any("federated does not beat the best hospital alone" in line for line in lines)
    worse = [line for line in lines if line.startswith("federated, epsilon 3")]
    assert worse
    assert all("does not beat" in line and "(it is worse)" in line for line in worse)
    assert all(not verdict["beats"] for verdict in to_dict(items)["verdicts"])


def test_way_that_failed_or_has_no_defined_score_is_a_row_and_no_verdict():
    rng = np.random.default_rng(1)
    targets, units = np.ones(50, np.int64), np.arange(50)
    ways = ways_to_compare(["x", "y"], epsilons=(3.0,))
    items = [trained(way, 1.0, rng, targets, units) for way in ways[:-1]]
    nothing = dict.fromkeys(SCORES)
    items.append(
        Trained(way=ways[-1], status="failed", problem="too few", metrics=nothing, ci95={}, samples={})
    )
    assert verdicts_of(items) == []
    assert rows_of(items)[-1].note == "too few"
    assert rows_of(items)[-1].rounds is None
    assert rows_of(items)[0].metrics["auc"] is None
    json.dumps(to_dict(items), allow_nan=False)


def test_pages_say_the_same_and_are_safe(tmp_path):
    head = HEAD | {"data": HEAD["data"] | {"name": "<script>alert(1)</script>"}}
    items = example()
    write_comparison(tmp_path, head | to_dict(items), items)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "comparison.html",
        "comparison.json",
        "comparison.md",
        "comparison.png",
    ]
    tags, texts = [], []
    parser = HTMLParser()
    parser.handle_starttag = lambda name, attributes: tags.append(name)
    parser.handle_data = texts.append
    parser.feed((tmp_path / "comparison.html").read_text())
    assert "script" not in tags
    assert "img" in tags
    text, card = " ".join(texts), (tmp_path / "comparison.md").read_text()
    for row in rows_of(items):
        assert row.title in text
        assert row.title.split(" (")[0] in card
    assert "Left out: z" in text
    assert "generated by a program" in text
    assert "<script" not in card.replace("\\<script", "")
    stored = json.loads((tmp_path / "comparison.json").read_text())
    assert [way["name"] for way in stored["ways"]][:2] == ["central", "alone-x"]
    assert stored["ways"][0]["private"] is False


def test_terminal_table_fits_eighty_columns_when_narrow():
    from rich.console import Console

    console = Console(width=80, file=io.StringIO())
    console.print(terminal_table(example(), narrow=True))
    text = console.file.getvalue()
    assert max(len(line.rstrip()) for line in text.splitlines()) <= 80
    assert text.count("alone") == 5
    assert "…" not in text
    assert re.search(r"\.\d{3}–\.\d{3}", text)


def test_reproducible_comparison_claims_no_privacy():
    assert "no row of this comparison is private" in markdown(HEAD | {"reproducible": True}, example())


@pytest.mark.parametrize(
    ("flags", "text", "expected"),
    [
        ({}, "", (1.0, 3.0, 8.0)),
        ({"epsilon": 2.0}, "", (2.0,)),
        ({}, "1, 4.5", (1.0, 4.5)),
        ({}, "3", (3.0,)),
    ],
)
def test_epsilons_come_from_either_flag(flags, text, expected):
    assert chosen_epsilons(Scenario(**flags), text) == expected


@pytest.mark.parametrize(
    ("flags", "text"),
    [
        ({"epsilon": 2.0}, "1"),
        ({"private": False}, "1"),
        ({}, "1,x"),
        ({}, "0"),
        ({}, "inf"),
        ({}, "-1,2"),
        ({}, ","),
    ],
)
def test_impossible_epsilons_are_refused(flags, text):
    with pytest.raises(ConfigError, match="--epsilons"):
        chosen_epsilons(Scenario(**flags), text)


PLANTED = "PLANTED-PATIENT"


def write_small_data(path):
    """120 patients to train on and 80 to test on, two images each; brighter with the finding."""
    rng = np.random.default_rng(0)
    arrays = {}
    for split, patients in (("train", 120), ("test", 80)):
        targets = np.repeat(rng.integers(2, size=patients), 2)
        noise = rng.normal(90, 30, (2 * patients, 28, 28))
        arrays[f"{split}_images"] = np.clip(noise + 15 * targets[:, None, None], 0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = targets
        arrays[f"{split}_patients"] = np.repeat([f"{PLANTED}-{split}-{i}" for i in range(patients)], 2)
    np.savez(path, **arrays)
    return path


@pytest.fixture(scope="module")
def small_data(tmp_path_factory):
    return write_small_data(tmp_path_factory.mktemp("data") / "films.npz")


def small_scenario(small_data, out, **flags):
    wait_little = ("server.patience-s=30",)
    values = {"data": str(small_data), "hospitals": 2, "model": "softmax", "rounds": 3, "set": wait_little}
    return make_scenario(values | {"out": str(out)} | flags)


@pytest.fixture(scope="module")
def compared(small_data, tmp_path_factory):
    said = []
    out = tmp_path_factory.mktemp("compared") / "out"
    return compare(small_scenario(small_data, out), epsilons=(8.0,), baselines=True, say=said.append), said


def of_the_model(comparison):
    return [way for way in comparison.content["ways"] if not way["baseline"]]


def test_every_way_is_trained_and_scored_as_its_own_run_is(compared):
    comparison, said = compared
    assert [way["name"] for way in of_the_model(comparison)] == [
        "central",
        "alone-hospital-1",
        "alone-hospital-2",
        "federated",
        "federated-epsilon-8",
    ]
    assert not comparison.stopped
    assert len(said) == 9
    for way in of_the_model(comparison):
        result = json.loads((comparison.folder / way["name"] / "result.json").read_text())
        assert way["status"] == result["status"] == "completed"
        assert way["rounds"] == 3
        assert way["private"] is result["private"]
        for name in SCORES:
            assert way["metrics"][name] == pytest.approx(result["test"][name], abs=1e-6)
            assert way["ci95"][name] == pytest.approx(result["test"]["ci95"][name], abs=1e-6)
    assert 0 < of_the_model(comparison)[-1]["epsilon_spent"] <= 8
    assert [way["epsilon_spent"] for way in of_the_model(comparison)[:-1]] == [None] * 4
    assert len(comparison.content["verdicts"]) == 4


def test_baselines_stand_after_the_model_and_leave_nothing_but_their_rows(compared):
    comparison, _ = compared
    baselines = comparison.content["ways"][5:]
    assert [way["baseline"] for way in baselines] == [method for method in METHODS for _ in range(3)]
    assert [way["hospitals"] for way in baselines[:3]] == [
        ["hospital-1", "hospital-2"],
        ["hospital-1"],
        ["hospital-2"],
    ]
    assert all(way["status"] == "completed" and way["metrics"]["auc"] > 0.6 for way in baselines)
    assert not list(comparison.folder.glob("baseline*"))


def test_every_way_uses_the_same_split_and_central_has_all_patients(compared):
    comparison, _ = compared
    targets, rows = [], {}
    for way in of_the_model(comparison):
        folder = comparison.folder / way["name"]
        with np.load(folder / "held-back.npz", allow_pickle=False) as held_back:
            targets.append(held_back["test_targets"].tolist())
        for part in folder.glob("hospitals/*/data/images.npz"):
            with np.load(part, allow_pickle=False) as images:
                rows[way["name"], part.parents[1].name] = len(images["train_labels"])
    assert all(other == targets[0] for other in targets)
    assert rows["central", "all-patients"] == 240
    assert rows["alone-hospital-1", "hospital-1"] + rows["alone-hospital-2", "hospital-2"] == 240
    assert rows["federated", "hospital-1"] == rows["alone-hospital-1", "hospital-1"]


def test_no_patient_stands_anywhere_in_a_comparison(compared):
    comparison, _ = compared
    files = [path for path in comparison.folder.rglob("*") if path.is_file()]
    assert len(files) > 50
    # Unicode arrays in an npz are UTF-32: look for both spellings.
    spellings = (PLANTED.encode(), PLANTED.encode("utf-32-le"))
    assert not [path for path in files if any(spelling in path.read_bytes() for spelling in spellings)]


def test_stop_ends_the_comparison_with_what_is_trained(small_data, tmp_path):
    out = tmp_path / "out"

    def stop_when_training():
        wait_until = time.monotonic() + 60
        while not (out / "central" / "metrics.jsonl").exists() and time.monotonic() < wait_until:
            time.sleep(0.01)
        (out / "central" / "stop").touch()

    stopper = threading.Thread(target=stop_when_training)
    stopper.start()
    comparison = compare(small_scenario(small_data, out, rounds=100_000, private="false"))
    stopper.join()
    assert comparison.stopped
    assert [way["status"] for way in comparison.content["ways"]] == ["stopped"]
    assert (out / "comparison.html").is_file()


def test_one_hospital_cannot_be_compared_and_leaves_no_folder(small_data, tmp_path):
    with pytest.raises(ConfigError, match="at least two hospitals"):
        compare(small_scenario(small_data, tmp_path / "out", hospitals=1))
    assert not list(tmp_path.glob("out/*"))


def test_command_has_the_flags_of_run_and_its_own():
    text = CliRunner().invoke(app, ["compare", "--help"]).stdout
    for flag in (
        "--data",
        "--partition",
        "--hospitals",
        "--set",
        "--epsilons",
        "--alone-private",
        "--format",
    ):
        assert flag in text
