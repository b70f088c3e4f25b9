"""`flower-simulate ensemble`: the average, stacking, and the epsilon of all members on the same patients."""

import json
import shutil
import sys

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from client.ledger.ledger import Ledger
from common.errors import ConfigError, LedgerError
from common.privacy.accountant import epsilon
from simulations import cli
from simulations.ensemble import NO_PRIVACY, averaged, ensemble, log_odds, stacked
from simulations.ensemble_members import read_members
from simulations.ensemble_privacy import composed_costs
from simulations.held_back import read_held_back
from simulations.predictions import predict_splits
from simulations.run import run_scenario
from simulations.scenario import make_scenario


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two private runs on the same patients: `narrow` sees fewer pixels, at another epsilon and delta."""
    folder = tmp_path_factory.mktemp("ensemble")
    rng, arrays = np.random.default_rng(0), {}
    for split, patients in (("train", 120), ("val", 60), ("test", 80)):
        targets = np.repeat(rng.integers(2, size=patients), 2)
        noise = rng.normal(90, 30, (2 * patients, 28, 28))
        arrays[f"{split}_images"] = np.clip(noise + 15 * targets[:, None, None], 0, 255).astype(np.uint8)
        arrays[f"{split}_labels"] = targets
        arrays[f"{split}_patients"] = np.repeat([f"{split}-{i}" for i in range(patients)], 2)
    np.savez(folder / "films.npz", **arrays)
    common = {"data": str(folder / "films.npz"), "hospitals": 2, "model": "softmax", "rounds": 2}
    for name, flags in (
        ("wide", {"epsilon": 3.0}),
        ("narrow", {"epsilon": 2.0, "delta": 1e-4, "image_size": 20, "set": ("federation.seed=5",)}),
    ):
        run_scenario(make_scenario(common | flags | {"out": str(folder / name)}))
    return folder


def changed(folder, name, like, **roster_and_result):
    """A copy of a run in which the roster or keys of result.json are others."""
    copy = folder.parent / f"{folder.name}-{name}"
    shutil.copytree(folder / like, copy)
    roster = roster_and_result.pop("roster", None)
    if roster:
        (copy / "hospitals" / "roster.json").write_text(json.dumps({"hospitals": roster}))
    result = json.loads((copy / "result.json").read_text()) | roster_and_result
    (copy / "result.json").write_text(json.dumps(result))
    return copy


def events_of(run, hospital, purpose):
    charges = Ledger.open(run / "hospitals" / hospital / "ledger", create=False).charges()
    mine = [charge for charge in charges if charge.purpose == purpose]
    return [charge.event for charge in mine], min(charge.delta for charge in charges)


def test_the_average_is_scored_on_the_test_patients_that_all_share(folder):
    content = ensemble([folder / "wide", folder / "narrow"], out=folder / "out")
    members = read_members([folder / "wide", folder / "narrow"])
    asked = {m.name: (m.folder / "held-back.npz", m.config) for m in members}
    said = [splits["test"] for splits in predict_splits(asked, ("test",)).values()]
    targets = read_held_back(folder / "wide" / "held-back.npz").sets["test"].targets
    mean = (said[0] + said[1]) / 2
    assert content["average"]["metrics"]["auc"] == pytest.approx(roc_auc_score(targets, mean[:, 1]))
    for member, run in zip(content["members"], ("wide", "narrow"), strict=True):
        result = json.loads((folder / run / "result.json").read_text())
        assert member["run_id"] == result["run_id"]
        for name in ("auc", "accuracy"):
            assert member["metrics"][name] == pytest.approx(result["test"][name], abs=1e-6)
            if run == "wide":  # the other one draws its patients by a seed of its own
                assert member["ci95"][name] == pytest.approx(result["test"]["ci95"][name], abs=1e-6)
    low, high = content["average"]["ci95"]["auc"]
    assert low < content["average"]["metrics"]["auc"] < high
    assert json.loads((folder / "out" / "ensemble.json").read_text()) == content
    with pytest.raises(ConfigError, match="empty folder"):
        ensemble([folder / "wide", folder / "narrow"], out=folder / "out")


@pytest.mark.parametrize("purpose", ["training", "evaluation"])
def test_every_member_is_charged_by_the_accountant_on_both_sequences(folder, purpose):
    costs = composed_costs(read_members([folder / "wide", folder / "narrow"]))
    assert [cost.name for cost in costs] == ["hospital-1", "hospital-2"]
    for cost in costs:
        (one, delta), (other, smaller) = (
            events_of(folder / r, cost.name, purpose) for r in ("wide", "narrow")
        )
        assert smaller < delta
        assert cost.delta == smaller
        composed = cost.epsilon if purpose == "training" else cost.validation_epsilon
        assert composed == pytest.approx(epsilon([*one, *other], delta=smaller), rel=1e-3)
        assert composed > max(epsilon(one, delta=smaller), epsilon(other, delta=smaller))
        if purpose == "training":
            assert 2 < max(cost.members.values()) <= 3
            assert composed > max(cost.members.values())


def test_a_member_counts_only_for_the_patients_that_it_had(folder):
    only_second = changed(folder, "alone", "narrow", roster=["hospital-2"], run_id="another")
    pair = composed_costs(read_members([folder / "wide", folder / "narrow"]))
    three = composed_costs(read_members([folder / "wide", folder / "narrow", only_second]))
    assert three[0] == pair[0]
    assert three[1].epsilon > pair[1].epsilon
    alone = composed_costs(read_members([folder / "wide", only_second]))
    own, delta = events_of(folder / "wide", "hospital-1", "training")
    assert alone[0].epsilon == pytest.approx(epsilon(own, delta=delta), rel=6e-3)
    assert alone[0].epsilon >= alone[0].members["wide"]


def test_with_a_member_without_privacy_nothing_is_claimed(folder):
    content = ensemble([folder / "wide", changed(folder, "open", "narrow", private=False, run_id="open")])
    assert content["privacy"]["private"] is False
    assert content["privacy"]["epsilon"] is None
    assert [h["epsilon"] for h in content["privacy"]["hospitals"]] == [None, None]


def test_runs_on_other_patients_are_refused(folder):
    wide = folder / "wide"
    with pytest.raises(ConfigError, match="two or more"):
        ensemble([wide, wide])
    with pytest.raises(ConfigError, match="same run"):
        ensemble([wide, changed(folder, "again", "wide")])
    seeded = changed(folder, "seeded", "narrow", run_id="seeded")
    text = (seeded / "scenario.toml").read_text()
    (seeded / "scenario.toml").write_text(text.replace("seed = 0", "seed = 1"))
    with pytest.raises(ConfigError, match="--seed"):
        ensemble([wide, seeded])
    config = changed(folder, "images", "narrow", run_id="images") / "config.toml"
    config.write_text(config.read_text().replace('unit = "patient"', 'unit = "image"'))
    with pytest.raises(ConfigError, match="unit of protection"):
        ensemble([wide, config.parent])
    renamed = changed(folder, "other-films", "narrow", run_id="films")
    with np.load(renamed / "held-back.npz", allow_pickle=False) as archive:
        arrays = dict(archive)
    arrays["test_targets"] = arrays["test_targets"][::-1]
    np.savez(renamed / "held-back.npz", **arrays)
    with pytest.raises(ConfigError, match="held-back patients differ"):
        ensemble([wide, renamed])
    swapped = changed(folder, "swapped", "narrow", run_id="swapped")
    one, two = (swapped / "hospitals" / f"hospital-{n}" / "data" / "images.npz" for n in (1, 2))
    kept = one.read_bytes()
    one.write_bytes(two.read_bytes())
    two.write_bytes(kept)
    with pytest.raises(ConfigError, match="other patients"):
        ensemble([wide, swapped])
    (swapped / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match="no finished model"):
        ensemble([wide, swapped])


def test_a_member_whose_ledger_is_gone_is_not_taken_for_free(folder):
    lost = changed(folder, "lost", "narrow", run_id="lost")
    shutil.rmtree(lost / "hospitals" / "hospital-1" / "ledger")
    with pytest.raises(LedgerError):
        ensemble([folder / "wide", lost])


def test_stacking_says_loudly_that_it_is_not_private(folder, capsys, monkeypatch):
    words = ["flower-simulate", "ensemble", str(folder / "wide"), str(folder / "narrow"), "--stacking"]
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert ended.value.code in (0, None)
    shown = " ".join(capsys.readouterr().out.split())
    assert NO_PRIVACY in shown
    assert "stacking" in shown
    assert "validation patients" in shown
    assert not list((folder / "wide").glob("*stack*"))


def test_stacking_needs_validation_patients_of_every_class(folder):
    said = [np.array([[0.2, 0.8], [0.6, 0.4]])] * 2
    with pytest.raises(ConfigError, match="not every class"):
        stacked(said, np.array([1, 1]), said)
    bare = [changed(folder, f"bare-{n}", name, run_id=name) for n, name in enumerate(("wide", "narrow"))]
    for run in bare:
        with np.load(run / "held-back.npz", allow_pickle=False) as archive:
            arrays = {name: values for name, values in archive.items() if not name.startswith("validation")}
        np.savez(run / "held-back.npz", **arrays)
    with pytest.raises(ConfigError, match="no validation patients"):
        ensemble(bare, stacking=True)


def test_stacking_finds_the_member_that_knows_something():
    rng = np.random.default_rng(1)
    targets = rng.integers(3, size=600)
    knowing = np.eye(3)[targets] + rng.uniform(0, 0.9, (600, 3))
    guessing = rng.uniform(0.05, 1, (600, 3))
    said = [rows / rows.sum(axis=1, keepdims=True) for rows in (knowing, guessing)]
    known, asked = [rows[:300] for rows in said], [rows[300:] for rows in said]
    found = stacked(known, targets[:300], asked)
    assert found.shape == (300, 3)
    np.testing.assert_allclose(found.sum(axis=1), 1)

    def accuracy(rows):
        return (rows.argmax(axis=1) == targets[300:]).mean()

    assert accuracy(found) > accuracy(averaged(asked)) + 0.02
    assert np.isfinite(log_odds([np.array([[0.0, 1.0]])])).all()
