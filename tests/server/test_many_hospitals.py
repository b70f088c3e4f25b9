"""What a run of very many hospitals writes and sends stays small for each of them."""

import json

from server.closing import descriptions_for
from server.hospitals import Hospital
from server.reporting.model_card import model_card
from server.reporting.plots import draw_plots
from server.reporting.run_history import growths
from server.reporting.run_record import read_run
from tests.run_folders import build_run


def hospitals(count):
    return [Hospital(name=f"h{n}", node_id=n, enrolled_patients=20) for n in range(count)]


def description(count):
    costs = {f"h{n}": {"epsilon": 1.0 + n, "epsilon_outsider": 0.5 + n} for n in range(count)}
    return json.dumps({"sha256": "s", "privacy": {"private": True, "epsilon": 9.0, "hospitals": costs}})


def test_a_few_hospitals_get_the_description_as_it_is():
    text = description(3)
    assert list(descriptions_for(hospitals(3), text)) == [text] * 3
    assert list(descriptions_for(hospitals(200), "")) == [""] * 200


def test_each_of_many_gets_its_own_costs_and_not_those_of_the_others():
    lengths = {}
    for count in (200, 1000):
        texts = list(descriptions_for(hospitals(count), description(count)))
        last = json.loads(texts[-1])
        name = f"h{count - 1}"
        assert last["privacy"]["hospitals"] == {
            name: {"epsilon": float(count), "epsilon_outsider": count - 0.5}
        }
        assert last["privacy"]["epsilon"] == 9.0
        lengths[count] = max(map(len, texts))
    assert lengths[1000] < lengths[200] + 10


def test_a_run_without_privacy_has_no_costs_to_leave_out():
    text = json.dumps({"privacy": {"private": False, "epsilon": None}})
    assert json.loads(next(descriptions_for(hospitals(101), text))) == json.loads(text)


def test_the_card_and_the_texts_of_pictures_do_not_grow_with_the_hospitals(tmp_path):
    runs = {
        count: read_run(
            build_run(
                tmp_path / str(count), rounds=2, hospitals=tuple(f"hospital-{n:04d}" for n in range(count))
            )
        )
        for count in (150, 450)
    }
    cards = {count: model_card(run) for count, run in runs.items()}
    assert "And 350 hospitals more" in cards[450]
    assert "hospital-0099" in cards[450]
    assert "hospital-0100" not in cards[450]
    assert len(cards[450]) < len(cards[150]) + 100
    texts = {
        count: {plot.name: plot.alt for plot in draw_plots(run) if plot.name in ("participation", "epsilon")}
        for count, run in runs.items()
    }
    for name in ("participation", "epsilon"):
        assert len(texts[450][name]) < len(texts[150][name]) + 100
    assert texts[450]["participation"].endswith("390 more.")
    curves = growths(runs[450])
    assert len(curves) == 450
    assert all(curves.values())
