"""docs/benchmarks.md has every figure that has a bar, and says on what, when and by which command."""

import json
from pathlib import Path

import pytest

from common.errors import ConfigError
from simulations.benchmarks.figures import figures_of
from simulations.benchmarks.page import BEGIN, END, merged, page_text, render, write_page

PAGE = Path(__file__).parents[2] / "docs" / "benchmarks.md"
STORED = json.loads(PAGE.with_suffix(".json").read_text())
STEPS = {
    "cnn 28px/128": 1.5,
    "cnn 64px/64": 1.4,
    "cnn 150px/32": 1.3,
    "cnn-flatten 28px/128": 1.5,
    "cnn-flatten 64px/64": 1.4,
    "cnn-flatten 150px/32": 1.3,
}
"""The requirement's cases, and their bars against the twin."""
MACHINE = {"cpu": "C", "cores": 2, "threads": 2, "python": "3", "torch": "2", "flwr": "1", "opacus": "1"}
MACHINE |= {"numpy": "2", "hospital_federation": "0", "memory_bytes": None, "system": "S", "load_1min": None}
MACHINE |= {"date": "2026-01-02T03:04:05Z"}


def rows_of_page():
    """Figure, bar, measured and verdict of each row of the first table."""
    lines = PAGE.read_text().split("### Figures with a bar")[1].split("###")[0].splitlines()
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")][
        2:
    ]


def bar_of(*words):
    bars = [row[1] for row in rows_of_page() if all(word in row[0] for word in words)]
    assert bars, words
    return bars


def test_the_page_has_every_figure_with_its_bar():
    for case, bar in STEPS.items():
        assert bar_of(f"{case}:", "against the twin")[0] == f"at most {bar:.2f}; aim 1.10"
        assert bar_of(f"{case}:", "Opacus hooks") == ["at least 3.30"]
        assert bar_of(f"{case}:", "Opacus ghost") == ["at least 1.25"]
    for case in (*STEPS, "resnet18 64px/64"):
        assert bar_of(f"{case} ragged:", "DP-SGD step") == ["at most 1.40"]
        assert bar_of(f"{case}:", "peak memory") == ["at most 1.50"]
        assert bar_of(f"{case} ragged:", "peak memory") == ["at most 1.50"]
    assert bar_of("resnet18 64px/64:", "DP-SGD step") == ["at most 1.50"]
    assert set(bar_of("bytes up per round")) == {"at most 0.260"}
    assert bar_of("final test AUC", "5 seeds") == ["at most 0.0030"]
    assert bar_of("server memory") == ["at most 3.00"]
    assert set(bar_of("reduction")) == {"at least 0.60"}
    assert bar_of("whole simulation", "10 hospitals x 5 rounds", "Ray") == ["at least 5.00"]
    assert bar_of("1,000 hospitals x 2 rounds", "memory") == ["at most 3.00"]
    assert bar_of("1,000 hospitals x 2 rounds", "time per hospital") == ["at most 1.30"]
    assert bar_of("--help") == bar_of("`status`") == ["at most 0.50"]
    assert bar_of("first training step") == ["at most 5.00"]


def test_the_page_says_when_how_and_on_what():
    text, machine = PAGE.read_text(), STORED["machine"]
    assert f"Measured on {machine['date'][:10]} with `{STORED['command']}`" in text
    for name in ("cpu", "python", "torch", "opacus", "flwr", "numpy", "hospital_federation"):
        assert machine[name] in text, name
    assert all(about["date"] in text for about in STORED["parts"].values())


def test_the_page_shows_the_numbers_beside_it():
    text = PAGE.read_text()
    assert text[text.index(BEGIN) + len(BEGIN) + 1 : text.index(END)] == render(STORED)


def test_a_figure_is_judged_by_its_bar():
    server = {"throughput_ratio": 0.7, "memory": {"models_above_idle": 3.1}}
    found = {figure.name: figure for figure in figures_of({"server": server})}
    floats = next(f for name, f in found.items() if "float32 updates" in name)
    memory = next(f for name, f in found.items() if "server memory" in name)
    ray = next(f for name, f in found.items() if "Ray" in name)
    assert (floats.measured, floats.verdict) == ("0.70", "yes")
    assert (memory.measured, memory.verdict) == ("3.10", "no")
    assert (ray.measured, ray.verdict) == ("not measured", "not measured")


def content(**parts):
    about = {part: {"date": "d", "seconds": 1.0} for part in parts}
    return {"machine": dict(MACHINE), "parts": about, "command": "flower-simulate bench", **parts}


def test_a_part_measured_alone_keeps_the_others_of_the_same_machine():
    stored = content(wire={"old": 1}, scale={"old": 2}, dp_step=[]) | {"noise": {"kept": True}}
    together = merged(content(wire={"new": 1}), stored)
    assert together["wire"] == {"new": 1}
    assert together["scale"] == {"old": 2}
    assert together["noise"] == {"kept": True}
    assert set(together["parts"]) == {"wire", "scale", "dp_step"}
    elsewhere = stored | {"machine": MACHINE | {"torch": "1"}}
    assert merged(content(wire={"new": 1}), elsewhere) == content(wire={"new": 1})


def test_a_part_that_failed_does_not_take_the_place_of_an_older_one():
    failed = content() | {"parts": {"scale": {"date": "d", "seconds": 1.0, "failed": "no memory"}}}
    together = merged(failed, content(scale={"old": 2}))
    assert together["scale"] == {"old": 2}
    assert "failed" not in together["parts"]["scale"]


def test_only_what_is_between_the_markers_is_written(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"before\n{BEGIN}\nof yesterday\n{END}\nafter\n")
    write_page(page, content(wire={"cnn": {"parameters": 5, "bytes_message": 3, "ratio_to_float32": 1 / 3}}))
    text = page.read_text()
    assert text.startswith(f"before\n{BEGIN}\n")
    assert text.endswith(f"{END}\nafter\n")
    assert "of yesterday" not in text
    assert json.loads(page.with_suffix(".json").read_text())["wire"]["cnn"]["ratio_to_float32"] == 0.333333


@pytest.mark.parametrize("text", ["", BEGIN, f"{END}\n{BEGIN}", f"{BEGIN}\n{BEGIN}\n{END}"])
def test_a_page_without_a_place_is_refused(tmp_path, text):
    page = tmp_path / "page.md"
    page.write_text(text)
    with pytest.raises(ConfigError, match="no place"):
        page_text(page)
