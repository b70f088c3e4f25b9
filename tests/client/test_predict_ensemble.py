"""`flower-client predict --ensemble`: the average of several models, and what is said about them."""

import json
import sys

import numpy as np
import pytest
from PIL import Image

from client import cli
from client.images.phantoms import hospital_phantoms
from client.prediction.ensemble import ADDS_UP, UNCLAIMED, ask, read_models
from client.prediction.inputs import find_inputs
from client.prediction.passport import limits, passport
from common.errors import ConfigError, ModelError
from common.models.registry import initial_parameters
from tests.client.stored_models import spec_of, store

LIMIT = 10**7


def privacy(*hospitals, complete=True):
    named = {f"h{n}": {"epsilon": e, "delta": d} for n, (e, d) in enumerate(hospitals)}
    return {"private": True, "unit": "patient", "epsilon_complete": complete, "hospitals": named}


@pytest.fixture
def models(tmp_path):
    """Three models of one task that see 32, 28 and 32 pixels; each with an operating point of its own."""
    return [
        store(
            tmp_path / f"run-{n}",
            spec_of(size=size),
            initial_parameters(spec_of(size=size), n),
            run_id=f"lungs-{n}",
            operating_point={"threshold": 0.9},
            privacy=privacy((n + 1.0, 1e-4), (n + 1.5, 5e-5)),
        )
        for n, size in enumerate((32, 28, 32))
    ]


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    folder.mkdir()
    drawn = hospital_phantoms(hospital=1, num_patients=5, image_size=80, seed=3)
    for number, pixels in enumerate(drawn.images[:5]):
        Image.fromarray(pixels).save(folder / f"{number}.png")
    Image.fromarray(drawn.images[0]).resize((15, 15)).save(folder / "small.png")
    return folder


def predict(capsys, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["flower-client", "predict", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    return ended.value.code, capsys.readouterr()


def test_the_average_is_decided_at_one_half_each_member_with_its_own_pixels(films, models):
    inputs = find_inputs([films], max_pixels=LIMIT)
    whole = read_models(models)
    together = list(ask(whole, inputs, max_pixels=LIMIT))
    alone = [list(ask(read_models([model]), inputs, max_pixels=LIMIT)) for model in models]
    assert [answer.is_answered for answer in together] == [True] * 5 + [False]
    for answer, *members in zip(together[:5], *(told[:5] for told in alone), strict=True):
        said = np.mean([member.probabilities["opacity"] for member in members], axis=0)
        assert answer.probabilities["opacity"] == pytest.approx(said, abs=1e-12)
        assert answer.decision == ("opacity" if said > 0.5 else "normal")
        assert answer.calibrated is answer.observed is None
    assert len({told[0].probabilities["opacity"] for told in alone}) == 3
    assert "own operating points do not apply" in whole.rule


def test_where_one_member_abstains_nobody_answers(films, models):
    """15 px are half of 28 px, but too few for a model that sees 32."""
    inputs = find_inputs([films / "small.png"], max_pixels=LIMIT)
    assert next(ask(read_models(models[1:2]), inputs, max_pixels=LIMIT)).is_answered
    refused = next(ask(read_models([models[1], models[0]]), inputs, max_pixels=LIMIT))
    assert refused.probabilities is None
    assert refused.reason == "too-small"
    assert "member 2 (lungs-0)" in refused.words


def test_json_and_page_name_each_member_and_the_sum(capsys, monkeypatch, tmp_path, films, models):
    others = [word for model in models[1:] for word in ("--ensemble", model)]
    page = tmp_path / "pages"
    words = (models[0], films, *others, "--page", page, "--format", "json")
    code, shown = predict(capsys, monkeypatch, *words)
    content = json.loads(shown.out)
    assert code == 1  # small.png
    assert "model" not in content
    assert content["answered"] == 5
    hashes = [json.loads((model / "model.json").read_text())["sha256"] for model in models]
    members = content["ensemble"]["members"]
    assert [(m["sha256"], m["epsilon"], m["delta"]) for m in members] == [
        (sha256, n + 1.5, 1e-4) for n, sha256 in enumerate(hashes)
    ]
    stated = content["ensemble"]["privacy"]
    assert stated["epsilon_at_most"] == pytest.approx(1.5 + 2.5 + 3.5)
    assert stated["delta_at_most"] == pytest.approx(3e-4)
    assert stated["what"] == ADDS_UP
    assert content["decision"]["operating_point"] is None
    text = next(page.glob("0001*.html")).read_text()
    for said in (*hashes, "7.50", "add up", "not evaluated"):
        assert said in text
    code, shown = predict(capsys, monkeypatch, models[0], films, *others)
    assert all(said in shown.out for said in (*hashes, "epsilon at most 7.50", "add up"))


def test_without_a_whole_claim_of_every_member_nothing_is_claimed(tmp_path, models):
    for number, stated in enumerate(
        ({"private": False, "epsilon": None}, privacy((1.0, 1e-5), complete=False), privacy((None, None)))
    ):
        spec = spec_of()
        weights = initial_parameters(spec, 7 + number)
        other = store(tmp_path / f"open-{number}", spec, weights, privacy=stated)
        whole = read_models([models[0], other])
        assert whole.privacy == {"epsilon_at_most": None, "delta_at_most": None, "what": UNCLAIMED}
        assert UNCLAIMED in dict(passport(whole))["Privacy of all members together"]
        assert any("without privacy" in line for line in limits(whole)) is not stated["private"]


def test_members_must_answer_one_question(tmp_path, models, films):
    other = ("opacity", "normal")
    swapped = store(tmp_path / "swapped", spec_of(), initial_parameters(spec_of(), 8), classes=other)
    findings = store(
        tmp_path / "findings", spec_of(), initial_parameters(spec_of(), 9), task="multi-label", loss="bce"
    )
    for stranger in (swapped, findings):
        with pytest.raises(ModelError, match="another question"):
            read_models([models[0], stranger])
    with pytest.raises(ModelError, match="same model"):
        read_models([models[0], models[0]])
    with pytest.raises(ConfigError, match="no finished model"):
        read_models([models[0], films])


def test_an_ensemble_has_no_heat_map(capsys, monkeypatch, tmp_path, films, models):
    words = (models[0], films, "--ensemble", models[1], "--heat-map", tmp_path / "heat")
    code, shown = predict(capsys, monkeypatch, *words)
    assert code == 2
    assert "an ensemble has no heat map" in shown.err
    assert not (tmp_path / "heat").exists()
