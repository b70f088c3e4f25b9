"""The threshold on histograms whose best edge is known, exactly and under noise."""

import numpy as np
import pytest

from common.config import EvaluationSection, FederationConfig
from common.errors import ConfigError
from common.evaluation import CountPlan, bin_edges, count_patients
from common.operating_point import believed, choose, rates_of
from common.recalibration import fit, recalibrated
from common.settings import parse

TEN = bin_edges(10)
# The finding spreads over the upper seven bins, the others over the lower four: best is edge 3 or 4.
FINDING = np.array([0, 0, 0, 10, 40, 50, 60, 60, 80, 100], float)
OTHERS = np.array([60, 40, 30, 20, 0, 0, 0, 0, 0, 0], float)
KNOWN = np.stack([FINDING, OTHERS])
# A model that is sure of most patients, as a linear one is: the best edge is 9.
CROWDED = np.array([[2, 2, 2, 2, 2, 3, 3, 4, 6, 364], [100, 6, 5, 4, 4, 4, 3, 3, 4, 2]], float)


def youden(histograms, edge):
    finding, others = histograms
    return finding[edge:].sum() / finding.sum() + others[:edge].sum() / others.sum() - 1


def test_without_noise_it_is_the_best_edge_by_hand():
    point = choose(KNOWN, TEN, deviation=0.0)
    assert point["threshold"] == 0.4  # 390 of 400 and all 150
    assert point["sensitivity"] == pytest.approx(390 / 400)
    assert point["specificity"] == 1.0
    assert (point["noise"], point["rule"]) == (0.0, "balanced")


def test_under_noise_it_loses_less_than_the_edge_that_looks_best():
    random = np.random.default_rng(0)
    best, chosen, lucky = youden(CROWDED, 9), [], []
    assert best == max(youden(CROWDED, edge) for edge in range(1, 10))
    for _ in range(100):
        noised = CROWDED + np.rint(10 * random.standard_normal(CROWDED.shape))
        point = choose(noised, TEN, deviation=10.0)
        # Where the noise hides everything none is chosen, and one half decides.
        chosen.append(youden(CROWDED, round(10 * point["threshold"]) if point else 5))
        lucky.append(youden(CROWDED, max(range(1, 10), key=lambda edge, seen=noised: youden(seen, edge))))
    assert np.mean(chosen) > best - 0.02
    assert best - np.mean(chosen) < 0.7 * (best - np.mean(lucky))


def test_the_stated_rates_are_near_the_true_ones():
    random = np.random.default_rng(1)
    points = [
        choose(KNOWN + np.rint(4 * random.standard_normal(KNOWN.shape)), TEN, deviation=4.0)
        for _ in range(100)
    ]
    at = [round(10 * point["threshold"]) for point in points]
    true = [FINDING[edge:].sum() / 400 for edge in at], [OTHERS[:edge].sum() / 150 for edge in at]
    for name, rates in zip(("sensitivity", "specificity"), true, strict=True):
        gaps = np.array([point[name] for point in points]) - rates
        assert abs(gaps.mean()) < 0.02, name
        assert np.abs(gaps).max() < 0.2, name


def test_the_same_counts_give_the_same_point():
    noised = KNOWN + np.rint(10 * np.random.default_rng(3).standard_normal(KNOWN.shape))
    assert choose(noised, TEN, deviation=10.0) == choose(noised, TEN, deviation=10.0)


@pytest.mark.parametrize(("rule", "threshold"), [("sensitivity:0.95", 0.4), ("sensitivity:.85", 0.5)])
def test_a_wanted_sensitivity_is_reached_at_the_highest_edge(rule, threshold):
    # Shares of the finding from edges .4, .5, .6 on: .975, .875, .75.
    point = choose(KNOWN, TEN, deviation=0.0, rule=rule)
    assert point["threshold"] == threshold
    assert point["sensitivity"] >= float(rule.split(":")[1])


def test_a_sensitivity_that_no_edge_reaches_gives_no_point():
    lowest = np.stack([np.r_[100.0, np.zeros(9)], OTHERS])
    assert choose(lowest, TEN, deviation=0.0, rule="sensitivity:0.95") is None


def test_a_fixed_threshold_needs_no_counts():
    assert choose(np.zeros((2, 10)), TEN, deviation=5.0, rule="0.35") == {
        "threshold": 0.35, "rule": "0.35", "source": "fixed in the plan",
        "sensitivity": None, "specificity": None, "noise": None,
    }  # fmt: skip
    point = choose(KNOWN, TEN, deviation=0.0, rule="0.5")
    assert (point["threshold"], point["sensitivity"]) == (0.5, pytest.approx(350 / 400))


def test_noise_alone_is_no_reason_to_choose():
    random = np.random.default_rng(2)
    alone = [np.rint(12 * random.standard_normal((2, 10))) for _ in range(100)]
    # Two deviations let a total through one time in forty, on each side.
    assert sum(choose(counts, TEN, deviation=12.0) is not None for counts in alone) < 5
    alike = [np.full((2, 10), 20.0) + np.rint(12 * random.standard_normal((2, 10))) for _ in range(100)]
    assert sum(choose(counts, TEN, deviation=12.0) is not None for counts in alike) < 10


def test_believed_counts_are_whole_not_below_zero_and_near_what_is_sure():
    noised = np.array([[-30.0, 0.0, 400.0, 3.0], [1000.0, -2.0, 50.0, 10.0]])
    drawn = believed(noised, deviation=5.0)
    assert (drawn >= 0).all()
    assert (drawn == np.rint(drawn)).all()
    sure = noised > 40
    assert drawn.mean(axis=0)[sure] == pytest.approx(noised[sure], abs=1.0)
    assert drawn.std(axis=0)[sure] == pytest.approx(5.0, rel=0.15)
    assert drawn.mean(axis=0)[0, 0] < 2
    np.testing.assert_array_equal(believed(noised, deviation=0.0)[0], noised)


def test_rates_rise_and_fall_over_the_edges():
    rates = rates_of(KNOWN + 3.0, deviation=8.0)
    assert (np.diff(rates.sensitivity, axis=1) <= 0).all()
    assert (np.diff(rates.specificity, axis=1) >= 0).all()


def test_bins_of_the_logit_are_finer_near_0_and_1_and_keep_one_half():
    edges = bin_edges(10, "logit")
    assert (edges[0], edges[5], edges[-1]) == (0.0, 0.5, 1.0)
    inner = np.log(edges[1:-1] / (1 - edges[1:-1]))
    np.testing.assert_allclose(np.diff(inner), 0.6)
    np.testing.assert_array_equal(bin_edges(4), [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize("scale", ["probability", "logit"])
def test_patients_are_counted_in_the_bins_between_the_edges(scale):
    random = np.random.default_rng(5)
    finding = np.r_[random.random(300) ** 4, bin_edges(8, scale)]
    targets = random.integers(2, size=len(finding))
    plan = CountPlan.of(["scores"], classes=2, score_bins=8, score_scale=scale)
    counts = count_patients(plan, np.stack([1 - finding, finding], axis=1), targets)["scores"]
    edges = bin_edges(8, scale)
    for place, label in enumerate((1, 0)):
        mine = finding[targets == label]
        upper = [*edges[1:-1], np.inf]
        expected = [((mine >= low) & (mine < high)).sum() for low, high in zip(edges, upper, strict=False)]
        assert counts[8 * place : 8 * place + 8] == expected


@pytest.mark.parametrize("rule", ["best", "sensitivity:1.5", "sensitivity:", "1.2", "0", "balanced "])
def test_an_unknown_rule_is_refused(rule):
    with pytest.raises(ConfigError, match="operating-point"):
        parse(FederationConfig, {"evaluation": {"operating-point": rule}}, source="federation.toml")


def test_every_rule_that_is_accepted_can_be_followed():
    for rule in ("balanced", "sensitivity:0.9", "sensitivity:.9", "0.5", ".5"):
        section = EvaluationSection(operating_point=rule)
        assert choose(KNOWN, TEN, deviation=0.0, rule=section.operating_point) is not None


def test_recalibration_says_how_often_it_was_so():
    points = fit(KNOWN, TEN, deviation=0.0)
    said, so = np.array(points["said"]), np.array(points["so"])
    assert (np.diff(so) >= 0).all()
    shares = FINDING / (FINDING + OTHERS)
    np.testing.assert_allclose(so, shares)  # they rise, so that nothing is pooled
    middle = recalibrated(np.array([[0.65, 0.35], [0.9, 0.1], [np.nan, np.nan]]), points)
    assert middle[0, 1] == pytest.approx(10 / 30)
    assert middle[1, 1] == 0.0
    assert np.isnan(middle[2]).all()
    np.testing.assert_allclose(middle[:2].sum(axis=1), 1.0)
    assert said[0] == pytest.approx(0.05)


def test_recalibration_pools_what_falls_and_keeps_quiet_about_noise():
    falling = np.array([[10.0, 30, 10, 40], [30.0, 10, 30, 10]])
    so = fit(falling, bin_edges(4), deviation=0.0)["so"]
    assert so == pytest.approx([0.25, 0.5, 0.5, 0.8])
    assert fit(np.full((2, 10), 2.0), TEN, deviation=20.0) is None


def test_recalibration_from_noised_counts_is_better_than_none():
    """Others crowd at .35 where half are said to have it: the noised map says so."""
    random = np.random.default_rng(6)
    true = np.clip((TEN[1:] + TEN[:-1]) / 2 - 0.3, 0.02, 1)
    patients = np.full(10, 120.0)
    counts = np.stack([np.rint(patients * true), patients - np.rint(patients * true)])
    middles = (TEN[1:] + TEN[:-1]) / 2
    rows = np.stack([1 - middles, middles], axis=1)
    for _ in range(10):
        noised = counts + np.rint(8 * random.standard_normal(counts.shape))
        gaps = np.abs(recalibrated(rows, fit(noised, TEN, deviation=8.0))[:, 1] - true)
        assert gaps.mean() < 0.5 * np.abs(middles - true).mean()
