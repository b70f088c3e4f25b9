"""What a reviewer reads: every plot as an offline SVG with a text, both thresholds, hidden groups."""

import base64
import json
from html.parser import HTMLParser
from xml.etree import ElementTree

import pytest

from server.reporting.evaluation_part import SUPPRESSED, group_rows, score_rows
from server.reporting.evaluation_plots import EVALUATION_PLOTS
from server.reporting.report import write_report
from server.reporting.run_record import read_run
from tests.run_folders import add_assessment, build_run

SVG = "{http://www.w3.org/2000/svg}"
PLOTS = {
    "ROC": ("operating point", "95 % band", "false positive rate"),
    "Precision and recall": ("operating point", "precision"),
    "Calibration (expected calibration error .043)": ("recalibrated", "observed share"),
    "Confusion matrix": ("predicted", "true", "40"),
    "Confusion matrix at the operating point (.800)": ("44", "93", "88 %"),
    "Sensitivity and specificity over the threshold": ("sensitivity", "specificity", "operating point"),
    "AUC by hospital": ("north", "south", "all"),
}


class Figures(HTMLParser):
    """Source and alternative text of each picture, and its caption."""

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.found, self.text, self._caption = {}, "", False
        self.feed(content)

    def handle_starttag(self, name, attributes):
        if name == "img":
            self._image = dict(attributes)
        self._caption = name == "figcaption"

    def handle_data(self, data):
        self.text += f" {data}"
        if self._caption:
            self.found[data] = self._image
            self._caption = False


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = add_assessment(build_run(tmp_path_factory.mktemp("report") / "run"))
    return folder, Figures(write_report(folder).read_text())


@pytest.mark.parametrize("title", PLOTS)
def test_every_plot_is_an_svg_that_shows_its_words_and_loads_nothing(report, title):
    image = report[1].found[title]
    kind, content = image["src"].split(",", 1)
    assert kind == "data:image/svg+xml;base64"
    text = base64.b64decode(content).decode()
    root = ElementTree.fromstring(text)
    assert root.tag == f"{SVG}svg"
    assert root.get("viewBox")
    words = " ".join("".join(element.itertext()).strip() for element in root.iter(f"{SVG}text"))
    for word in PLOTS[title]:
        assert word in words, word
    assert len(list(root.iter(f"{SVG}path"))) > 5
    addresses = [value for element in root.iter() for key, value in element.items() if key.endswith("href")]
    assert all(address.startswith("#") for address in addresses)
    assert "<script" not in text
    assert len(image["alt"]) > 30


def test_the_texts_carry_the_numbers(report):
    texts = {title: image["alt"] for title, image in report[1].found.items()}
    assert "At the operating point recall .930, specificity .880" in texts["ROC"]
    assert "After recalibration the expected error is .021" in texts[next(t for t in texts if "Calib" in t)]
    assert "from 0.5 on sensitivity .750, specificity .500" in texts[list(PLOTS)[5]]
    assert "north .840 (.800 to .880); south .900" in texts["AUC by hospital"]
    assert "normal as pneumonia: 6" in texts["Confusion matrix at the operating point (.800)"]


def test_the_same_run_gives_the_same_svg(report):
    run = read_run(report[0])
    first, second = ([draw(run).svg for draw in EVALUATION_PLOTS[:1]] for _ in range(2))
    assert first == second


def test_scores_stand_beside_those_at_the_operating_point(report):
    header, rows = score_rows(read_run(report[0]))
    assert header == ("score", "at 0.5", "95 % interval", "at .800", "95 % interval")
    assert ("accuracy", ".810", ".790 to .830", ".910", ".900 to .920") in rows
    assert ("AUC", ".871", ".850 to .890", "same", "same") in rows
    text = report[1].text
    assert "called from .800 on" in text
    assert "was not chosen on these patients" in text
    assert "error is .021 (before: .043)" in text
    assert "Worst hospital: AUC .840 (north)" in text


def test_hidden_groups_are_shown_as_suppressed_and_nothing_else(report):
    _, rows = group_rows(read_run(report[0]))
    assert rows[0] == ("sex: female", "61", ".862", ".900", ".890", ".920", SUPPRESSED)
    assert rows[1] == ("sex: male", "52", SUPPRESSED, ".913", SUPPRESSED, SUPPRESSED, SUPPRESSED)
    assert set(rows[2]) == {"age: under 18", SUPPRESSED}


def test_the_card_says_the_same(report):
    card = (report[0] / "MODEL_CARD.md").read_text()
    for words in ("at .800", "Worst hospital", "age: under 18 | suppressed", "before: .043"):
        assert words in card.replace("\\", ""), words


def test_an_older_run_without_all_that_has_its_pages(tmp_path):
    folder = build_run(tmp_path / "run")
    header, rows = score_rows(read_run(folder))
    assert header == ("score", "value", "95 % interval")
    assert group_rows(read_run(folder))[1] == []
    assert "operating point" not in Figures(write_report(folder).read_text()).text


def test_undefined_rates_leave_out_their_marks_and_not_the_plot(tmp_path):
    folder = add_assessment(build_run(tmp_path / "run"))
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    content["test"]["at_operating_point"]["metrics"]["specificity"] = None
    content["test"]["thresholds"]["specificity"] = [None] * 11
    path.write_text(json.dumps(content))
    plots = {plot.name: plot for draw in EVALUATION_PLOTS if (plot := draw(read_run(folder)))}
    assert "operating point" not in plots["roc"].alt
    assert "thresholds" not in plots
