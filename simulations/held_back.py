"""What the simulation keeps from every hospital to score the model on, from outside.

No setting is chosen on `test`, which no hospital ever sees; `validation`, where the data name one, is what
settings may be chosen on, and the hospitals have it dealt out among them for their own noised counts. The
file holds pixels, labels and numbers, no patient id.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from client.images.decoded import DecodedRecords
from client.images.splits import TEST, TRAIN, VALIDATION
from common.errors import DataError
from common.examples import Examples
from common.files import write_bytes_atomically
from simulations.partition import Partition, majority_labels

TEST_SHARE = 0.25
"""Share of patients held back where the data name no test split."""
SPLITS = (VALIDATION, TEST)


@dataclass(frozen=True, kw_only=True, eq=False)
class Split:
    """Unit indices of each side."""

    train: NDArray[np.int64]
    validation: NDArray[np.int64]
    test: NDArray[np.int64]
    is_named: bool
    """Whether the data name the test split; else it was drawn."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ScoredSet:
    """One held-back split."""

    images: NDArray[np.uint8]
    """(rows, channels, size, size)"""
    targets: NDArray[np.int64]
    """(rows,) or (rows, findings)."""
    units: NDArray[np.int64]
    """(rows,) which patient, by number."""
    hospitals: NDArray[np.int64]
    """(rows,) position on the roster of the hospital whose kind of patient it is; -1 for none."""


@dataclass(frozen=True, kw_only=True, eq=False)
class HeldBack:
    """Everything that is scored from outside."""

    sets: Mapping[str, ScoredSet]
    """By split name, empty splits left out."""
    is_named: bool

    @classmethod
    def of(
        cls, decoded: DecodedRecords, split: Split, *, groups: Sequence[str] | None, partition: Partition
    ) -> Self:
        """Collect the held-back rows; with `groups`, a row belongs to the hospital of its value."""
        hospital_of_value = _hospital_of_value(groups, partition)
        named = {VALIDATION: split.validation, TEST: split.test}
        return cls(
            sets={
                name: _scored(decoded.examples, units, groups, hospital_of_value)
                for name, units in named.items()
                if len(units)
            },
            is_named=split.is_named,
        )


def hold_back(decoded: DecodedRecords, *, groups: Sequence[str] | None, seed: int) -> Split:
    """Split the units: as the data say, else a quarter of the patients of each class (and group) to test.

    Raises DataError when nothing is left to train on.
    """
    splits = np.array([split or TRAIN for split in decoded.unit_splits])
    train = np.flatnonzero(splits == TRAIN)
    validation, test = np.flatnonzero(splits == VALIDATION), np.flatnonzero(splits == TEST)
    is_named = len(test) > 0
    if not is_named:
        labels = majority_labels(
            decoded.examples.targets, decoded.examples.units, num_units=decoded.examples.num_units
        )
        strata = [f"{labels[unit]} {groups[unit] if groups else ''}" for unit in train.tolist()]
        drawn = draw_stratified(strata, share=TEST_SHARE, seed=seed)
        train, test = train[~drawn], train[drawn]
    if not len(train) or not len(test):
        raise DataError(
            f"{len(train)} patients to train on and {len(test)} to test on are too few",
            fix="use more images, or correct the split column",
        )
    return Split(
        train=train.astype(np.int64),
        validation=validation.astype(np.int64),
        test=test.astype(np.int64),
        is_named=is_named,
    )


def deal_validation(
    split: Split, *, groups: Sequence[str] | None, partition: Partition, seed: int
) -> dict[str, NDArray[np.int64]]:
    """The validation patients of each hospital, for its own noised counts; the simulation scores them, too.

    With `groups` a patient goes to the hospital of its value, without they are dealt out at random, to each
    hospital as many as its share of the training patients.
    """
    names = list(partition.hospitals)
    if groups is not None:
        of_value = _hospital_of_value(groups, partition)
        owner = np.array([of_value.get(groups[unit], -1) for unit in split.validation.tolist()], np.int64)
        return {name: split.validation[owner == position] for position, name in enumerate(names)}
    shuffled = np.random.default_rng([seed, 0x7A11]).permutation(split.validation)
    sizes = np.cumsum([len(units) for units in partition.hospitals.values()])
    ends = np.rint(len(shuffled) * sizes / sizes[-1]).astype(np.int64)
    dealt = np.split(shuffled, ends[:-1])
    return {name: np.sort(units) for name, units in zip(names, dealt, strict=True)}


def draw_stratified(strata: Sequence[str], *, share: float, seed: int) -> NDArray[np.bool_]:
    """(units,) a share of each stratum, drawn by `seed`; small strata are rounded by chance, not to zero."""
    random = np.random.default_rng([seed, 0x7E57])
    chosen = np.zeros(len(strata), dtype=np.bool_)
    values = np.array(strata)
    for stratum in sorted(set(strata)):
        members = random.permutation(np.flatnonzero(values == stratum))
        wanted = share * len(members)
        count = int(wanted) + int(random.random() < wanted - int(wanted))
        chosen[members[:count]] = True
    return chosen


def write_held_back(path: Path, held_back: HeldBack) -> None:
    """Write the splits as one `.npz` of numbers, for this user only."""
    arrays: dict[str, NDArray[Any]] = {"is_named": np.array(held_back.is_named)}
    for name, scored in held_back.sets.items():
        for field in ("images", "targets", "units", "hospitals"):
            arrays[f"{name}_{field}"] = getattr(scored, field)
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)  # type: ignore[arg-type]
    write_bytes_atomically(path, buffer.getvalue(), mode=0o600)


def read_held_back(path: Path) -> HeldBack:
    """Read `write_held_back`; raises DataError."""
    try:
        with np.load(path, allow_pickle=False) as archive:
            sets = {
                name: ScoredSet(
                    images=archive[f"{name}_images"],
                    targets=archive[f"{name}_targets"],
                    units=archive[f"{name}_units"],
                    hospitals=archive[f"{name}_hospitals"],
                )
                for name in SPLITS
                if f"{name}_images" in archive
            }
            return HeldBack(sets=sets, is_named=bool(archive["is_named"]))
    except (OSError, ValueError, KeyError, EOFError) as error:
        raise DataError(
            f"{path} cannot be read",
            why=type(error).__name__,
            fix="restore the run folder, or start a new run",
        ) from None


def _hospital_of_value(groups: Sequence[str] | None, partition: Partition) -> dict[str, int]:
    """Position on the roster of the hospital that has each value of the column; the first of several."""
    positions: dict[str, int] = {}
    if groups is not None:
        for position, units in enumerate(partition.hospitals.values()):
            for value in {groups[unit] for unit in units.tolist()}:
                positions.setdefault(value, position)
    return positions


def _scored(
    examples: Examples,
    units: NDArray[np.int64],
    groups: Sequence[str] | None,
    hospital_of_value: Mapping[str, int],
) -> ScoredSet:
    table = examples.select_units(units)
    hospitals = [-1 if groups is None else hospital_of_value.get(groups[unit], -1) for unit in units.tolist()]
    return ScoredSet(
        images=table.inputs["image"],
        targets=table.targets,
        units=table.units,
        hospitals=np.array(hospitals, np.int64)[table.units],
    )
