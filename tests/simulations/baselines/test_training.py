"""`flower-simulate compare --baselines`: the rows in table, JSON and pages, and what is refused."""

import json

import numpy as np
import pytest
from typer.testing import CliRunner

from common.errors import ConfigError
from simulations.baselines import training
from simulations.baselines.classifiers import METHODS
from simulations.cli import app
from simulations.compare import compare
from simulations.comparison import BASELINES_ARE, rows_of, to_dict, verdicts_of
from simulations.comparison_page import markdown, terminal_table, write_comparison
from simulations.preparation import prepare
from simulations.scenario import make_scenario
from simulations.ways import baseline_ways

HEAD = {
    "data": {"name": "films", "task": "classification", "unit": "patient", "generated": True},
    "seed": 0,
    "reproducible": False,
    "model": "cnn-small",
    "partition": "column:site",
    "hospitals": [{"name": "north"}, {"name": "south"}],
    "left_out": [],
    "test": {"images": 80, "units": 40},
}


def write_films(folder):
    """Two hospitals by column, two films a patient, brighter with the finding; nobody in the south has it."""
    from PIL import Image

    rng = np.random.default_rng(0)
    lines = ["path,label,patient,site,split"]
    for patient in range(90):
        south = patient % 3 == 0
        split = "test" if patient >= 50 else "train"
        label = int(rng.integers(2)) if split == "test" or not south else 0
        for film in range(2):
            shade = 90 + 40 * label + rng.normal(0, 15)
            pixels = np.clip(rng.normal(shade, 30, (16, 16)), 0, 255).astype(np.uint8)
            Image.fromarray(pixels).save(folder / f"{patient}-{film}.png")
            site = "south" if south else "north"
            lines.append(f"{patient}-{film}.png,{'ill' if label else 'well'},{patient},{site},{split}")
    (folder / "metadata.csv").write_text("\n".join(lines) + "\n")
    return folder / "metadata.csv"


def films_scenario(path, out, **flags):
    values = {
        "data": str(path),
        "partition": "column:site",
        "image_size": 16,
        "model": "softmax",
        "rounds": 2,
        "out": str(out),
        "set": ("server.patience-s=30", 'data.classes=["well","ill"]'),
    }
    return make_scenario(values | flags)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return prepare(films_scenario(write_films(folder), folder / "out"))


@pytest.fixture(scope="module")
def trained(prepared):
    said = []
    return training.train_baselines(prepared, seed=0, say=said.append), said


def test_every_method_has_central_and_alone_without_epsilon(trained):
    items, said = trained
    assert [item.way for item in items] == list(baseline_ways(["north", "south"], METHODS))
    assert len({item.way.name for item in items}) == 9
    assert len(said) == 3
    for item in items:
        assert item.status == "completed"
        assert not item.private
        assert item.way.epsilon is item.epsilon_spent is item.rounds is None
        if item.way.members != ("south",):
            assert item.metrics["auc"] > 0.8
            low, high = item.ci95["auc"]
            assert low < item.metrics["auc"] < high


def test_a_hospital_with_one_class_says_that_class(trained):
    south = [item for item in trained[0] if item.way.members == ("south",)]
    assert len(south) == 3
    for item in south:
        assert item.metrics["auc"] == 0.5
        assert item.metrics["recall"] == 0


def test_training_repeats_exactly(prepared, trained):
    again = training.train_baselines(prepared, seed=0, say=lambda line: None)
    assert [item.metrics for item in again] == [item.metrics for item in trained[0]]
    assert [item.ci95 for item in again] == [item.ci95 for item in trained[0]]


def test_table_shows_central_mean_and_best_under_one_heading(trained):
    rows = rows_of(trained[0])
    assert rows[0].heading
    assert rows[0].title == f"Classical baselines, {BASELINES_ARE}"
    assert [row.title for row in rows[1:4]] == [
        "logistic regression, central",
        "logistic regression, alone, mean of 2",
        "logistic regression, alone, best (north)",
    ]
    assert len(rows) == 10
    assert all(row.rounds is None and not row.heading for row in rows[1:])
    # They are no rivals of the federation's verdicts, which are about the model.
    assert verdicts_of(trained[0]) == []


def test_pages_and_json_carry_the_label(trained, tmp_path):
    from rich.console import Console

    items = trained[0]
    write_comparison(tmp_path, HEAD | to_dict(items), items)
    page, card = (tmp_path / "comparison.html").read_text(), (tmp_path / "comparison.md").read_text()
    console = Console(width=200)
    with console.capture() as shown:
        console.print(terminal_table(items, narrow=False))
    for text in (page, card, shown.get()):
        assert BASELINES_ARE in text
        assert "random forest, central" in text
        assert "SVM, alone, best (north)" in text
    assert "epsilon none" in card
    ways = json.loads((tmp_path / "comparison.json").read_text())["ways"]
    assert [way["name"] for way in ways[:3]] == [
        "baseline-logistic-regression-central",
        "baseline-logistic-regression-alone-north",
        "baseline-logistic-regression-alone-south",
    ]
    for way in ways:
        assert way["baseline"] in METHODS
        assert way["note"] == BASELINES_ARE
        assert way["private"] is False
        assert way["epsilon"] is way["epsilon_spent"] is way["rounds"] is None
    assert "Classical baselines" not in markdown(HEAD, [])


def test_stop_keeps_those_that_are_trained(prepared, monkeypatch):
    asked = []

    def interrupted(method, *arguments, **more):
        asked.append(method)
        if len(asked) == 3:
            raise KeyboardInterrupt
        return np.tile([0.5, 0.5], (len(more["asked"]), 1))

    monkeypatch.setattr(training, "fitted_probabilities", interrupted)
    items = training.train_baselines(prepared, seed=0, say=lambda line: None)
    assert [item.status for item in items] == ["completed", "completed", "stopped"]
    assert [row.note for row in rows_of(items)] == ["", "", "", "stopped"]


def test_series_are_refused_before_anything_is_read(tmp_path):
    scenario = make_scenario(
        {"series": "visits", "task": "progression", "model": "lstm", "out": str(tmp_path / "out")}
    )
    with pytest.raises(ConfigError, match="no baselines for series"):
        compare(scenario, baselines=True)
    assert not (tmp_path / "out").exists()


def test_command_has_the_flag():
    assert "--baselines" in CliRunner().invoke(app, ["compare", "--help"]).stdout
