import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from common.errors import ConfigError
from simulations.partition import (
    Partition,
    majority_labels,
    parse_partition,
    partition_units,
    slug,
)

LABELS = np.array([0, 0, 1] * 200)


def sizes(partition: Partition) -> list[int]:
    return [len(units) for units in partition.hospitals.values()]


def share_of_ones(partition: Partition) -> list[float]:
    return [float(LABELS[units].mean()) for units in partition.hospitals.values()]


@settings(max_examples=40, deadline=None)
@given(
    text=st.sampled_from(["iid", "dirichlet:0.5", "dirichlet:100", "size-skew"]),
    tiny=st.integers(0, 9),
    hospitals=st.integers(1, 8),
    seed=st.integers(0, 2**31 - 1),
)
def test_every_patient_has_exactly_one_hospital(text: str, tiny: int, hospitals: int, seed: int) -> None:
    spec = parse_partition(text + (f"+tiny:{tiny}" if tiny else ""))
    arguments = {"labels": LABELS, "num_hospitals": hospitals, "seed": seed}
    partition = partition_units(spec, **arguments)
    dealt = np.concatenate(list(partition.hospitals.values()))
    if tiny != 1:  # one patient alone is left out
        assert sorted(dealt.tolist()) == list(range(len(LABELS)))
    assert min(sizes(partition)) >= 2
    assert list(partition.hospitals)[:hospitals] == [f"hospital-{i}" for i in range(1, hospitals + 1)]
    again = partition_units(spec, **arguments)
    assert all((again.hospitals[name] == units).all() for name, units in partition.hospitals.items())


def test_iid_is_even_in_size_and_labels_and_moves_with_the_seed() -> None:
    first = partition_units(parse_partition("iid"), labels=LABELS, num_hospitals=5, seed=1)
    other = partition_units(parse_partition("iid"), labels=LABELS, num_hospitals=5, seed=2)
    assert sizes(first) == [120] * 5
    assert all(0.2 < share < 0.46 for share in share_of_ones(first))
    assert first.hospitals["hospital-1"].tolist() != other.hospitals["hospital-1"].tolist()


def test_a_small_alpha_skews_labels_and_a_large_one_does_not() -> None:
    def spread(alpha: float) -> float:
        return float(
            np.mean(
                [
                    np.std(
                        share_of_ones(
                            partition_units(
                                parse_partition(f"dirichlet:{alpha}"), labels=LABELS, num_hospitals=5, seed=s
                            )
                        )
                    )
                    for s in range(5)
                ]
            )
        )

    assert spread(0.3) > 0.2
    assert spread(1000) < 0.05


def test_size_skew_has_a_largest_of_sixteen_times_the_smallest() -> None:
    partition = partition_units(
        parse_partition("size-skew"), labels=np.zeros(10_000, int), num_hospitals=5, seed=0
    )
    assert sizes(partition) == sorted(sizes(partition), reverse=True)
    assert 15 < sizes(partition)[0] / sizes(partition)[-1] <= 16.1


def test_a_column_names_the_hospitals_and_says_who_is_left_out() -> None:
    groups = ["Hôpital Nord"] * 5 + ["b"] * 3 + ["a"] * 4 + [""] * 2 + ["alone"]
    partition = partition_units(
        parse_partition("column:site"), labels=np.zeros(15, int), groups=groups, minimum_units=3, seed=0
    )
    assert {name: units.tolist() for name, units in partition.hospitals.items()} == {
        "h-pital-nord": [0, 1, 2, 3, 4],
        "a": [8, 9, 10, 11],
        "b": [5, 6, 7],
    }
    reasons = {entry.name: entry.reason for entry in partition.left_out}
    assert reasons["alone"] == "1 patient to train on, at least 3 are needed"
    assert reasons["(blank)"] == "site is blank for 2 patients"


def test_a_number_of_hospitals_keeps_the_largest_of_a_column() -> None:
    groups = ["a"] * 5 + ["b"] * 3 + ["c"] * 4
    partition = partition_units(
        parse_partition("column:site"), labels=np.zeros(12, int), groups=groups, num_hospitals=2, seed=0
    )
    assert list(partition.hospitals) == ["a", "c"]
    assert [(entry.name, entry.reason) for entry in partition.left_out] == [("b", "not among the 2 largest")]


def test_values_that_give_the_same_name_stay_apart() -> None:
    partition = partition_units(
        parse_partition("column:site"),
        labels=np.zeros(4, int),
        groups=["St. A", "St. A", "st a", "st a"],
        seed=0,
    )
    assert sorted(partition.hospitals) == ["st-a", "st.-a"]
    same = partition_units(
        parse_partition("column:site"), labels=np.zeros(4, int), groups=["x y", "x y", "x-y", "x-y"], seed=0
    )
    assert list(same.hospitals) == ["x-y", "x-y-2"]


def test_a_tiny_hospital_takes_its_patients_from_the_others() -> None:
    partition = partition_units(parse_partition("iid+tiny:7"), labels=LABELS, num_hospitals=2, seed=0)
    assert len(partition.hospitals["hospital-tiny"]) == 7
    assert sum(sizes(partition)) == len(LABELS)


@pytest.mark.parametrize(
    "text",
    ["", "IID", "dirichlet", "dirichlet:-1", "dirichlet:nan", "dirichlet:x", "column", "column:", "iid:3"]
    + ["folders:x", "iid+tiny", "iid+tiny:0", "iid+small:3", "iid+tiny:-2"],
)
def test_other_words_are_refused_with_the_known_forms(text: str) -> None:
    with pytest.raises(ConfigError) as failure:
        parse_partition(text)
    assert "dirichlet:ALPHA" in str(failure.value)


@pytest.mark.parametrize(
    ("text", "hospitals"), [("iid", 400), ("iid+tiny:600", 2), ("dirichlet:0.001", 50), ("size-skew", 301)]
)
def test_what_cannot_be_dealt_out_is_refused(text: str, hospitals: int) -> None:
    with pytest.raises(ConfigError):
        partition_units(parse_partition(text), labels=LABELS, num_hospitals=hospitals, seed=0)


def test_the_label_of_a_patient_is_that_of_most_images() -> None:
    targets, units = np.array([1, 1, 0, 0, 1, 2]), np.array([0, 0, 0, 1, 1, 2])
    assert majority_labels(targets, units, num_units=4).tolist() == [1, 0, 2, 0]


def test_slugs_fit_the_roster() -> None:
    assert slug("  Royal/Hospital #3 ") == "royal-hospital-3"
    assert slug("..") == "hospital"
    assert len(slug("x" * 200)) == 60
