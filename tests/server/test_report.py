"""The report page: whole, offline, safe against names, and honest about privacy."""

import json
from html.parser import HTMLParser

import pytest

from common.errors import ConfigError
from common.pages.html import Html, bound, duration, figure, quantity, size, table, tag, tiny_bound
from server.reporting.report import write_report
from server.reporting.run_record import read_run
from tests.run_folders import build_run

NASTY = "<script>alert(1)</script>"


class Page(HTMLParser):
    """Collects tags, attributes and text, and checks that elements close in order."""

    VOID = frozenset({"img", "meta", "br", "hr"})

    def __init__(self, content):
        super().__init__(convert_charrefs=True)
        self.open, self.tags, self.attributes, self.texts = [], [], [], []
        self.feed(content)
        self.close()
        assert self.open == []

    def handle_starttag(self, name, attributes):
        self.tags.append(name)
        self.attributes.append((name, dict(attributes)))
        if name not in self.VOID:
            self.open.append(name)

    def handle_endtag(self, name):
        assert self.open.pop() == name

    def handle_data(self, data):
        self.texts.append(data)

    @property
    def text(self):
        return " ".join(self.texts)


def read_page(folder):
    return Page(write_report(folder).read_text())


def test_page_is_one_offline_file_with_every_part(tmp_path):
    page = read_page(build_run(tmp_path / "run"))
    identifiers = {attributes.get("id") for name, attributes in page.attributes if name == "section"}
    assert identifiers == {
        "results", "privacy", "hospitals", "learning", "decisions", "participation", "times", "settings",
        "provenance", "limits",
    }  # fmt: skip
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    addresses = [a[key] for _, a in page.attributes for key in ("src", "href", "data", "action") if key in a]
    assert addresses
    assert all(
        address.startswith(("data:image/png;base64,", "data:image/svg+xml;base64,", "#"))
        for address in addresses
    )
    assert "url(" not in page.text
    assert "@import" not in page.text


def test_every_picture_has_a_text_alternative_and_every_link_a_target(tmp_path):
    page = read_page(build_run(tmp_path / "run"))
    pictures = [attributes for name, attributes in page.attributes if name == "img"]
    assert len(pictures) == 7
    assert all(len(picture["alt"]) > 30 for picture in pictures)
    identifiers = {attributes.get("id") for _, attributes in page.attributes}
    links = {attributes["href"][1:] for name, attributes in page.attributes if name == "a"}
    assert links <= identifiers
    assert page.tags.count("h1") == 1
    assert page.attributes[0] == ("html", {"lang": "en"})


def test_private_run_states_unit_relation_epsilon_delta_accountant_and_limits(tmp_path):
    text = read_page(build_run(tmp_path / "run")).text
    assert "Differentially private per patient: epsilon at most 2.65" in text
    for words in (
        "add or remove one patient",
        "PLD",
        "Poisson sampling",
        "probability 0.5",
        "delta 1.00e-3",
        "not a medical device",
        "Not covered",
        "abab" * 16,
        "run-0001",
        "completed",
        "2026-09-21 14:13:22 UTC",
        ".850 to .890",
        "14,600 parameters",
        "flwr",
        "1.41",
    ):
        assert words in text, words


@pytest.mark.parametrize("reproducible", [False, True])
def test_run_without_a_claim_says_not_private_and_shows_no_epsilon(tmp_path, reproducible):
    folder = build_run(tmp_path / "run", private=reproducible)
    if reproducible:
        config = folder / "config.toml"
        text = config.read_text()
        assert "reproducible = false" in text
        config.write_text(text.replace("reproducible = false", "reproducible = true"))
    page = read_page(folder)
    strong = [a for name, a in page.attributes if a.get("class") == "banner not-private"]
    assert len(strong) == 1
    assert "not private" in page.texts
    assert "epsilon at most" not in page.text
    assert "2.45" not in page.text
    assert not (folder / "plots" / "epsilon.png").exists()
    assert ("seed" in page.text.split("Test AUC")[0]) is reproducible


def test_nothing_is_claimed_while_a_hospital_that_trained_has_said_no_epsilon(tmp_path):
    folder = build_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    result["hospitals"][1]["epsilon"] = None
    (folder / "result.json").write_text(json.dumps(result))
    text = read_page(folder).text
    assert "no epsilon to state yet" in text
    assert "epsilon at most" not in text


def test_names_from_elsewhere_are_text_wherever_they_stand(tmp_path):
    folder = build_run(
        tmp_path / "run",
        classes=(NASTY, '"><img src=x onerror=alert(1)>', "$\\frac{"),
        hospitals=("north", NASTY.replace("/", "|")),
        run_id=NASTY,
        data={"name": NASTY, "task": "classification", "unit": "patient"},
        model={"name": NASTY, "parameters": 1, "sha256": NASTY},
        engine=NASTY,
        status=NASTY,
    )
    page = read_page(folder)
    assert "script" not in page.tags
    assert not [key for _, attributes in page.attributes for key in attributes if key.startswith("on")]
    assert page.text.count("<script>alert(1)</script>") >= 6
    policies = [a["content"] for _, a in page.attributes if a.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_generated_images_are_named_as_generated(tmp_path):
    data = {"name": "phantoms", "classes": ["clear", "opacity"], "unit": "patient"}
    assert "generated by a program" in read_page(build_run(tmp_path / "made", data=data)).text
    assert "generated by a program" not in read_page(build_run(tmp_path / "real")).text


def test_scores_by_hospital_show_how_far_hospitals_are_apart(tmp_path):
    folder = build_run(tmp_path / "run")
    assert "each hospital's kind" not in read_page(folder).text
    evaluation = json.loads((folder / "evaluation.json").read_text())
    evaluation["hospitals"] = {
        "north": {"auc": 0.9, "accuracy": 0.8, "recall": None, "images": 40, "patients": 20},
        "<i>": {"auc": 0.75, "accuracy": 0.7, "recall": 0.5, "images": 1200, "patients": 600},
    }
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    page = read_page(folder)
    assert "The largest AUC difference is .150." in page.text
    assert "1,200" in page.text
    assert "i" not in page.tags


def test_participation_grid_tells_outcomes_by_letters(tmp_path):
    page = read_page(build_run(tmp_path / "run"))
    cells = [a for name, a in page.attributes if name == "td" and "title" in a]
    assert len(cells) == 6 * 3
    assert [a["title"] for a in cells if a["class"] == "refused"] == ["the hospital declined: budget-spent"]
    assert [a["title"] for a in cells if a["class"] == "late"] == ["answered after the round closed"]
    assert page.texts.count("T") == 16
    assert page.texts.count("R") == page.texts.count("L") == 1


def test_unfinished_run_and_real_federation_without_scores_have_a_page_too(tmp_path):
    folder = build_run(tmp_path / "run")
    for name in ("result.json", "evaluation.json"):
        (folder / name).unlink()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"round": 7, "hosp')
    text = read_page(folder).text
    assert "unfinished" in text
    assert "no metric computed on patients leaves a hospital" in text
    (folder / "metrics.jsonl").unlink()
    assert "No round has been played yet" in read_page(folder).text


def test_page_names_no_folder_of_this_machine_and_nobody(tmp_path):
    folder = build_run(tmp_path / "run")
    (folder / "hospitals" / "north" / "data").mkdir()
    (folder / "hospitals" / "north" / "data" / "patient-4711.png").touch()
    config = (folder / "config.toml").read_text().replace('run-folder = ""', f'run-folder = "{tmp_path}"')
    (folder / "config.toml").write_text(config)
    content = write_report(folder).read_text() + (folder / "MODEL_CARD.md").read_text()
    assert str(tmp_path) not in content
    assert "4711" not in content


def test_folder_that_is_no_run_and_broken_files_are_refused_with_a_remedy(tmp_path):
    with pytest.raises(ConfigError, match="not the folder of a run"):
        write_report(tmp_path)
    folder = build_run(tmp_path / "run")
    (folder / "evaluation.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        write_report(folder)


def test_name_of_a_hospital_is_never_a_path(tmp_path):
    folder = build_run(tmp_path / "run", hospitals=("../../elsewhere",))
    (folder / "hospitals" / "../../elsewhere").mkdir(parents=True, exist_ok=True)
    (folder / "hospitals" / "../../elsewhere/hospital.toml").write_text("[policy]\nepsilon = 99.0\n")
    assert read_run(folder).hospitals[0].budget is None


def test_upper_bounds_are_rounded_up_and_exact_ones_kept():
    assert bound(2.6412) == "2.65"
    assert bound(2.65) == "2.65"
    assert bound(2.6500001) == "2.66"
    assert bound(7.9991, 3) == "8.000"
    assert bound(0.0) == "0.00"
    assert bound(None) == "–"
    assert bound(float("inf")) == "infinite"
    assert tiny_bound(3.3333e-4) == "3.34e-4"
    assert tiny_bound(1e-5) == "1.00e-5"
    assert tiny_bound(9.999e-5) == "1.00e-4"
    assert tiny_bound(1 / 9420) == "1.07e-4"


def test_numbers_read_as_people_write_them():
    assert [figure(0.8714), figure(1.0), figure(-0.004), figure(None)] == [".871", "1.000", "-.004", "–"]
    assert [quantity(14600), quantity(2.5), quantity(float("nan"))] == ["14,600", "2.50", "–"]
    assert [duration(0.42), duration(24), duration(200), duration(7500)] == [
        "0.42 s",
        "24 s",
        "3 min 20 s",
        "2 h 5 min",
    ]
    assert [size(999), size(58_400), size(2_500_000_000)] == ["999 B", "58.4 kB", "2.5 GB"]


def test_markup_is_escaped_unless_it_was_built_here():
    assert tag("b", "<x>", title='"') == '<b title="&quot;">&lt;x&gt;</b>'
    assert tag("p", tag("b", "1"), ["&", Html("<i></i>")]) == "<p><b>1</b>&amp;<i></i></p>"
    assert "<script>" not in table("<script>", ("<script>",), [("<script>",)])


VALIDATION = {
    "round": 6,
    "model_sha256": "ab" * 32,
    "hospitals": ["north", "south"],
    "left_out": {"east": "metrics"},
    "auc": 0.853,
    "accuracy": None,
    "noise": {"auc": 0.021, "accuracy": None},
    "epsilon": 1.001,
    "delta": 1e-3,
}


def test_noised_counts_of_the_hospitals_are_shown_with_their_noise_and_their_cost(tmp_path):
    folder = build_run(tmp_path / "run", validation=VALIDATION)
    write_report(folder)
    for name in ("report.html", "MODEL_CARD.md"):
        text = (folder / name).read_text()
        assert "2 hospitals (1 gave none)" in text, name
        for words in (".853", ".021", "1.001", "1.00e-3", "Validation patients do not train"):
            assert words in text, (name, words)
    assert "Validation at the hospitals" in (folder / "report.html").read_text()


def test_without_released_counts_there_is_no_such_part(tmp_path):
    folder = build_run(tmp_path / "run", validation={"auc": 0.9, "ci95": {"auc": [0.8, 1.0]}})
    write_report(folder)
    assert "Validation at the hospitals" not in (folder / "report.html").read_text()


def test_the_page_states_two_epsilons_per_hospital_and_why(tmp_path):
    folder = build_run(tmp_path / "run")
    write_report(folder)
    text = (folder / "report.html").read_text()
    for words in (
        "against an outsider",
        "2.650</td><td>1.300",
        "Epsilon against an outsider, who sees the final model only",
        "at most 1.300. Why: sums only",
    ):
        assert words in text, words


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"epsilon_outsider_proven": False, "epsilon_complete": False}, "1.300 or more. Why: "),
        ({"epsilon_outsider_proven": True, "epsilon_complete": False}, "at most 1.300. Why: "),
        ({"epsilon_outsider": None}, "not stated for this run: nothing smaller"),
        ({"epsilon_outsider_reason": "alone"}, "2 of 3 hospitals: sums only; 1 of 3 hospitals: alone"),
    ],
)
def test_the_second_epsilon_is_said_as_surely_as_it_is_known(tmp_path, changes, words):
    folder = build_run(tmp_path / "run")
    result = json.loads((folder / "result.json").read_text())
    result["hospitals"][2] |= changes
    (folder / "result.json").write_text(json.dumps(result))
    write_report(folder)
    assert words in (folder / "report.html").read_text()
