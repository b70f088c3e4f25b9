"""Sex and age: read from usual columns, small groups never computed, and no total tells what is hidden."""

import itertools
import json

import numpy as np
import pytest
from sklearn import metrics as sklearn_metrics

from common.errors import ConfigError
from simulations.subgroups import LEAST, strata_of, subgroup_scores, suppressed


def scores(targets, said, sexes, *, units=None, ages=None):
    probabilities = np.stack([1 - said, said], axis=1)
    strata = {"sex": np.asarray(sexes)} | ({} if ages is None else {"age": np.asarray(ages)})
    units = np.arange(len(targets)) if units is None else units
    called = np.eye(2)[(said >= 0.4).astype(int)]
    return subgroup_scores(probabilities, called, targets, units=units, strata=strata)


@pytest.mark.parametrize(
    ("counts", "hidden"),
    [
        ([30, 40], [False, False]),
        ([4, 30, 12], [True, False, True]),  # 4 alone is the total less the others
        ([4, 3, 30, 12], [True, True, False, True]),  # 4 + 3 is still below ten
        ([6, 5, 30, 12], [True, True, False, False]),
        ([9, 30], [True, True]),
        ([9, 10, 10], [True, True, False]),
        ([0, 30, 12], [True, False, True]),
        ([3], [True]),
        ([10], [False]),
    ],
)
def test_cells_are_hidden_by_hand(counts, hidden):
    assert suppressed(counts) == hidden


def test_what_is_hidden_cannot_be_found_from_the_total():
    """Every table of three cells up to 14: hidden cells are two at least and together no small number."""
    for counts in itertools.product(range(15), repeat=3):
        hidden = suppressed(counts)
        assert all(is_hidden for count, is_hidden in zip(counts, hidden, strict=True) if count < LEAST)
        if any(hidden) and not all(hidden):
            assert sum(hidden) >= 2
            assert sum(c for c, is_hidden in zip(counts, hidden, strict=True) if is_hidden) >= LEAST


def test_scores_of_a_group_are_those_of_its_patients():
    random = np.random.default_rng(0)
    targets, sexes = random.integers(2, size=300), random.integers(2, size=300)
    said = np.clip(0.3 * targets + random.random(300) * 0.7, 0, 1)
    lines = {line["group"]: line for line in scores(targets, said, sexes)}
    assert list(lines) == ["female", "male"]
    for place, name in enumerate(("female", "male")):
        mine = sexes == place
        found, called = lines[name]["metrics"], said[mine] >= 0.4
        assert lines[name]["patients"] == mine.sum()
        assert found["auc"] == pytest.approx(sklearn_metrics.roc_auc_score(targets[mine], said[mine]))
        assert found["accuracy"] == pytest.approx(sklearn_metrics.accuracy_score(targets[mine], called))
        assert found["recall"] == pytest.approx(sklearn_metrics.recall_score(targets[mine], called))
        balanced = sklearn_metrics.balanced_accuracy_score(targets[mine], called)
        assert found["balanced_accuracy"] == pytest.approx(balanced)
        low, high = lines[name]["ci95"]["auc"]
        assert low < found["auc"] < high


def test_a_hidden_group_leaves_no_number_at_all():
    targets = np.tile([0, 1], 60)
    said = np.linspace(0, 1, 120)
    ages = np.repeat([0, 1, 2, 3], [7, 50, 15, 48])
    lines = {line["group"]: line for line in scores(targets, said, np.zeros(120, int), ages=ages)}
    assert lines["under 18"] == {"by": "age", "group": "under 18", "suppressed": True}
    # 15 would be the total less the others with 7 in it: the next smallest group is hidden as well.
    assert lines["40 to 64"] == {"by": "age", "group": "40 to 64", "suppressed": True}
    assert lines["18 to 39"]["patients"] == 50
    assert "male" not in lines  # nobody: nothing to protect, nothing to say
    assert '"suppressed": true}' in json.dumps(lines["under 18"])


def test_patients_count_and_not_images():
    targets = np.tile([0, 1], 30)
    units = np.repeat(np.arange(6), 10)  # sixty images of six patients
    (line,) = scores(targets, np.linspace(0, 1, 60), np.zeros(60, int), units=units)
    assert line == {"by": "sex", "group": "female", "suppressed": True}


def test_a_group_with_few_of_a_class_has_no_rates_of_classes():
    targets = np.r_[np.zeros(40, int), np.ones(3, int), np.tile([0, 1], 30), np.tile([0, 1], 40)]
    sexes = np.r_[np.zeros(43, int), np.ones(60, int), np.full(80, -1)]
    lines = {line["group"]: line for line in scores(targets, np.linspace(0, 1, 183), sexes)}
    assert set(lines["female"]["metrics"]) == {"accuracy"}
    # The three would follow from the findings of all, less those of the others: male is the next smallest.
    assert set(lines["male"]["metrics"]) == {"accuracy"}
    assert set(lines["unknown"]["metrics"]) > {"recall", "specificity", "auc"}


def test_columns_are_found_by_usual_names_and_read_as_people_write():
    groups = {
        "Patient Sex": ("F", "male", "Woman", "", "x"),
        "age": ("17", "18.0", "064Y", "006M", "430"),
        "site": ("a",) * 5,
    }
    found = strata_of(groups, columns={})
    assert found["sex"].tolist() == [0, 1, 0, -1, -1]
    assert found["age"].tolist() == [0, 1, 2, 0, -1]
    assert strata_of({"site": ("a",)}, columns={}) == {}
    named = strata_of({"years": ("65", "64", "40", "39")}, columns={"age": "Years"})
    assert named["age"].tolist() == [3, 2, 2, 1]


def test_a_column_that_is_named_and_not_there_is_refused():
    with pytest.raises(ConfigError, match="no column 'geschlecht' for the sex"):
        strata_of({"sex": ("F",)}, columns={"sex": "geschlecht"})
