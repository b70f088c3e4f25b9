"""The model card: every part, the privacy statement, and names that cannot break out."""

import re

import pytest

from server.reporting.model_card import model_card, plain
from server.reporting.run_record import read_run
from tests.run_folders import build_run

PARTS = ["Intended use", "Data", "Training", "Privacy statement", "Results", "Limits", "Where it comes from"]


def card_of(folder):
    return model_card(read_run(folder))


def test_card_has_its_parts_in_order_and_ends_with_a_newline(tmp_path):
    card = card_of(build_run(tmp_path / "run"))
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == PARTS
    assert card.startswith("# Model card: cnn-small for pneumonia\n")
    assert card.endswith("|\n")


def test_privacy_statement_names_what_nist_sp_800_226_asks_for(tmp_path):
    card = card_of(build_run(tmp_path / "run"))
    statement = card.split("## Privacy statement")[1].split("## Results")[0]
    for words in (
        "one patient with all their images",
        "add or remove one patient",
        "at most 2.650",
        "at most 1.00e-3",
        "DP-SGD",
        "Poisson",
        "PLD",
        "Composition",
        "scope: this run",
        "Trust model",
        "unbounded differential privacy",
        "**Epsilon against the server and the other hospitals**: at most 2.650",
        "**Epsilon against an outsider, who sees the final model only**: at most 1.300. Why: sums only",
        "a hospital that works together with the outsider",
        "| east | 2.650 | 1.300 | 3.34e-4 | 2.500 | .500 | 6 |",
        "Not covered",
    ):
        assert words in statement, words


def test_image_level_claims_say_so(tmp_path):
    data = {"name": "films", "classes": ["a", "b"], "unit": "image"}
    card = card_of(build_run(tmp_path / "run", data=data))
    assert "Differentially private per image" in card
    assert "a patient with several images is protected less" in card
    assert "per patient" not in card


def test_card_without_privacy_claims_nothing(tmp_path):
    card = card_of(build_run(tmp_path / "run", private=False))
    assert "**NOT PRIVATE.**" in card
    assert "epsilon at most" not in card
    assert "confidential patient data" in card


def test_card_before_the_end_of_the_run_says_what_is_missing(tmp_path):
    folder = build_run(tmp_path / "run")
    for name in ("result.json", "evaluation.json"):
        (folder / name).unlink()
    card = card_of(folder)
    assert "No held-back test split was scored" in card
    assert "not yet known" in card
    assert re.findall(r"^## (.*)$", card, re.MULTILINE) == PARTS


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("<script>", r"\<script\>"),
        ("a|b", r"a\|b"),
        ("[x](y)", r"\[x\](y)"),
        ("line\n# two", r"line \# two"),
        ("`c` *d* _e_", r"\`c\` \*d\* \_e\_"),
        ("plain name 1.5", "plain name 1.5"),
    ],
)
def test_text_from_elsewhere_is_no_markup(name, shown):
    assert plain(name) == shown


def test_nasty_class_names_stay_text_in_the_card(tmp_path):
    card = card_of(build_run(tmp_path / "run", classes=("<script>", "a|b"), hospitals=("x|y", "# z")))
    assert "<script>" not in card.replace(r"\<script\>", "")
    rows = [line for line in card.splitlines() if line.startswith("| x")]
    assert rows
    assert all(line.startswith(r"| x\|y |") for line in rows)
