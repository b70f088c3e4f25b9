"""The pictures: there when there are numbers, real PNGs, with texts that say the same."""

import io
import json

import numpy as np
import pytest
from PIL import Image

from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from server.reporting.plots import draw_plots, write_plots
from server.reporting.run_history import growths, participation_counts, round_seconds
from server.reporting.run_record import read_run
from tests.run_folders import build_run

ALL = ["learning_curves", "roc", "calibration", "confusion", "epsilon", "epsilon_growth"]
ALL += ["participation", "round_times"]


def pixels(png):
    with Image.open(io.BytesIO(png)) as picture:
        assert picture.format == "PNG"
        return np.asarray(picture.convert("L"))


def test_a_finished_run_has_every_picture_and_each_shows_something(tmp_path):
    run = read_run(build_run(tmp_path / "run"))
    plots = draw_plots(run)
    assert [plot.name for plot in plots] == ALL
    write_plots(run.folder, plots)
    for plot in plots:
        content = (run.folder / "plots" / f"{plot.name}.png").read_bytes()
        assert content == plot.png
        assert np.ptp(pixels(content)) > 200


def test_alternative_texts_carry_the_numbers(tmp_path):
    texts = {plot.name: plot.alt for plot in draw_plots(read_run(build_run(tmp_path / "run")))}
    assert "AUC (test) from .500 in round 1 to .833 in round 6" in texts["learning_curves"]
    assert "area .871 (95 % interval .850 to .890)" in texts["roc"]
    assert "expected error .043" in texts["calibration"]
    assert "normal as pneumonia: 3" in texts["confusion"]
    assert "east 2.65 of 3, south 2.55 of 3, north 2.45 of 3" in texts["epsilon"]
    assert "south: 2.55 after round 6" in texts["epsilon_growth"]
    assert "north aggregated 5, refused 1" in texts["participation"]
    assert "Rounds took 1.00 s to 1.00 s" in texts["round_times"]


def test_a_run_without_scores_rounds_or_privacy_has_no_pictures_of_them(tmp_path):
    folder = build_run(tmp_path / "run", private=False)
    (folder / "evaluation.json").unlink()
    assert [plot.name for plot in draw_plots(read_run(folder))] == ["participation", "round_times"]
    (folder / "metrics.jsonl").unlink()
    assert draw_plots(read_run(folder)) == []


def test_names_are_drawn_as_text_and_never_as_formulas(tmp_path):
    classes = ("$\\frac{", "日本語", "a\nb\x00", "_^{")
    run = read_run(build_run(tmp_path / "run", classes=classes, hospitals=("$x", "y")))
    assert len(draw_plots(run)) == len(ALL)


def test_many_hospitals_and_rounds_still_fit_a_picture(tmp_path):
    run = read_run(build_run(tmp_path / "run", rounds=40, hospitals=tuple(f"h{i}" for i in range(120))))
    plots = {plot.name: plot for plot in draw_plots(run)}
    assert all(max(pixels(plot.png).shape) < 2500 for plot in plots.values())
    assert "The 40 that spent most of 120" in plots["epsilon"].alt


def test_growth_without_reported_epsilons_is_composed_from_the_plan(tmp_path):
    folder = build_run(tmp_path / "run")
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("epsilon", None)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    run = read_run(folder)
    points = growths(run)[run.hospitals[1].name]
    assert [number for number, _ in points] == [1, 2, 3, 4, 5, 6]
    event = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.5, steps=6)
    assert points[-1][1] == pytest.approx(epsilon([event], delta=5e-4), rel=2e-3)
    # The round that a hospital refused is not charged.
    assert [number for number, _ in growths(run)[run.hospitals[0].name]] == [1, 2, 3, 4, 5]


def test_growth_of_a_long_run_is_thinned_and_keeps_its_end(tmp_path):
    run = read_run(build_run(tmp_path / "run", rounds=100))
    points = growths(run)[run.hospitals[1].name]
    assert len(points) <= 12
    assert points[-1] == (100, pytest.approx(10.1))


def test_only_the_last_attempt_of_a_round_counts(tmp_path):
    folder = build_run(tmp_path / "run", rounds=3)
    with (folder / "metrics.jsonl").open("a") as file:
        line = {"round": 3, "attempt": 1, "hospital": "north", "outcome": "aggregated", "code": None}
        file.write(json.dumps(line) + "\n")
    assert participation_counts(read_run(folder))["north"] == "aggregated 3"


def test_round_seconds_run_from_first_message_to_close(tmp_path):
    rows = round_seconds(read_run(build_run(tmp_path / "run", rounds=2)))
    assert rows == [(1, pytest.approx(1.0), pytest.approx(0.4)), (2, pytest.approx(1.0), pytest.approx(0.4))]
