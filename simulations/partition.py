"""Partitions: which patients belong to which simulated hospital. Pure functions; a patient stays whole.

iid               patients dealt out at random, as many to each hospital
dirichlet:ALPHA   label skew: each class is cut by a Dirichlet draw; small ALPHA means strong skew
size-skew         the largest hospital has 16 times the patients of the smallest
column:NAME       one hospital per value of a column of the data, such as column:site
folders           one hospital per sub-folder of the data root
...+tiny:N        one more hospital, of N patients drawn from all the others
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

import numpy as np
from numpy.typing import NDArray

from common.errors import ConfigError

Kind = Literal["iid", "dirichlet", "size-skew", "column", "folders"]
Units = NDArray[np.int64]
"""Indices of units (patients)."""

FOLDERS_COLUMN: Final = "folder"
"""Column under which the sub-folders of `folders` stand."""
TINY: Final = "hospital-tiny"
LARGEST_TO_SMALLEST: Final = 16.0
_DRAWS: Final = 1000
_USUAL_MINIMUM: Final = 10
_FORMS: Final = "iid, dirichlet:ALPHA, size-skew, column:NAME or folders, each with +tiny:N if wanted"


@dataclass(frozen=True, kw_only=True)
class PartitionSpec:
    """A partition as asked for."""

    kind: Kind
    alpha: float = 0.0
    """Concentration of `dirichlet`."""
    column: str = ""
    """Column of `column` and `folders`."""
    tiny: int = 0
    """Patients of one more, tiny hospital; 0 for none."""

    @property
    def finds_hospitals(self) -> bool:
        """Whether the data decide which hospitals there are."""
        return self.kind in ("column", "folders")


@dataclass(frozen=True)
class LeftOut:
    """A would-be hospital that does not take part."""

    name: str
    reason: str


@dataclass(frozen=True, eq=False)
class Partition:
    """Hospitals in roster order, and who is left out."""

    hospitals: dict[str, Units]
    left_out: tuple[LeftOut, ...] = ()


def parse_partition(text: str) -> PartitionSpec:
    """Read a partition such as `dirichlet:0.5+tiny:20`; raises ConfigError."""
    base, plus, extra = text.strip().partition("+")
    kind, _, argument = base.partition(":")
    tiny = 0
    if plus:
        named, _, count = extra.partition(":")
        if named != "tiny" or not count.isdecimal() or int(count) < 1:
            raise _unknown(text, f"after + stands tiny:N with N patients, not {extra!r}")
        tiny = int(count)
    if kind == "dirichlet":
        return PartitionSpec(kind="dirichlet", alpha=_alpha(text, argument), tiny=tiny)
    if kind == "column":
        if not argument:
            raise _unknown(text, "column needs the name of a column, for example column:site")
        return PartitionSpec(kind="column", column=argument, tiny=tiny)
    if argument or kind not in ("iid", "size-skew", "folders"):
        raise _unknown(text, "there is no such partition")
    if kind == "folders":
        return PartitionSpec(kind="folders", column=FOLDERS_COLUMN, tiny=tiny)
    return PartitionSpec(kind="iid" if kind == "iid" else "size-skew", tiny=tiny)


def partition_units(
    spec: PartitionSpec,
    *,
    labels: Units,
    groups: Sequence[str] | None = None,
    num_hospitals: int | None = None,
    minimum_units: int = 2,
    seed: int,
) -> Partition:
    """Deal the units 0..len(labels)-1 out to hospitals; the same arguments give the same partition.

    `labels` (units,) is the majority label of each unit, `groups` (units,) its value of the column that the
    spec names. `num_hospitals` is needed unless the data decide; then it keeps only the largest. Each
    hospital's units are in ascending order. Raises ConfigError when it cannot be done.
    """
    random = np.random.default_rng([seed, 0x5EED])
    pool = np.arange(len(labels), dtype=np.int64)
    tiny: Units | None = None
    if spec.tiny:
        if spec.tiny >= len(pool):
            raise ConfigError(
                f"+tiny:{spec.tiny} asks for {spec.tiny} patients, there are {len(pool)}", fix="ask for fewer"
            )
        tiny = np.sort(random.choice(pool, size=spec.tiny, replace=False))
        pool = np.setdiff1d(pool, tiny)
    if spec.finds_hospitals:
        if groups is None:
            raise ValueError("a partition by column needs the groups of the units")
        result = _by_group(pool, groups, column=spec.column, most=num_hospitals, minimum=minimum_units)
    else:
        parts = _dealt(spec, pool, labels, num_hospitals or 1, minimum_units, random)
        result = Partition(
            {f"hospital-{number}": np.sort(part) for number, part in enumerate(parts, start=1)}
        )
    if tiny is None:
        return result
    if len(tiny) < minimum_units:
        return Partition(result.hospitals, (*result.left_out, _too_few(TINY, len(tiny), minimum_units)))
    return Partition(result.hospitals | {TINY: tiny}, result.left_out)


def majority_labels(targets: Units, units: Units, *, num_units: int) -> Units:
    """(units,) the most frequent label of each unit's rows, the lower one among equals.

    Targets (rows, findings): a number for each set of findings, with those that half of the rows have.
    """
    if targets.ndim == 2:
        had = np.zeros((num_units, targets.shape[1]))
        np.add.at(had, units, 2 * targets - 1)
        return np.unique(had >= 0, axis=0, return_inverse=True)[1].reshape(-1).astype(np.int64)
    counts = np.zeros((num_units, int(targets.max(initial=0)) + 1), dtype=np.int64)
    np.add.at(counts, (units, targets), 1)
    return np.asarray(counts.argmax(axis=1), np.int64)


def slug(text: str) -> str:
    """A name that fits a roster and a folder: lower case, letters, digits, dots and dashes."""
    plain = re.sub(r"[^a-z0-9.]+", "-", text.casefold()).strip("-.")
    return plain[:60].strip("-.") or "hospital"


def _dealt(
    spec: PartitionSpec,
    pool: Units,
    labels: Units,
    num_hospitals: int,
    minimum: int,
    random: np.random.Generator,
) -> list[Units]:
    if len(pool) < num_hospitals * minimum:
        raise ConfigError(
            f"{len(pool)} patients are too few for {num_hospitals} hospitals",
            why=f"a hospital needs at least {minimum} to train",
            fix="ask for fewer --hospitals",
        )
    if spec.kind == "iid":
        return np.array_split(random.permutation(pool), num_hospitals)
    if spec.kind == "size-skew":
        return _size_skew(random.permutation(pool), num_hospitals, minimum)
    return _dirichlet(pool, labels, num_hospitals, minimum, alpha=spec.alpha, random=random)


def _size_skew(shuffled: Units, num_hospitals: int, minimum: int) -> list[Units]:
    """Sizes fall geometrically; everybody gets `minimum` first, so that nobody is too small."""
    weights = np.geomspace(LARGEST_TO_SMALLEST, 1, num_hospitals)
    spare = len(shuffled) - num_hospitals * minimum
    bounds = np.rint(np.cumsum(weights)[:-1] / weights.sum() * spare).astype(np.int64)
    return np.split(shuffled, bounds + minimum * np.arange(1, num_hospitals))


def _dirichlet(
    pool: Units,
    labels: Units,
    num_hospitals: int,
    minimum: int,
    *,
    alpha: float,
    random: np.random.Generator,
) -> list[Units]:
    """Cut each class by its own Dirichlet draw; draw again until nobody is too small.

    Source: Hsu, Qi and Brown, arXiv 1909.06335, section 3, by class as usual in later work.
    """
    wanted = max(minimum, min(_USUAL_MINIMUM, len(pool) // (4 * num_hospitals)))
    for _ in range(_DRAWS):
        parts: list[list[Units]] = [[] for _ in range(num_hospitals)]
        for label in np.unique(labels[pool]):
            members = random.permutation(pool[labels[pool] == label])
            shares = random.dirichlet(np.full(num_hospitals, alpha))
            cuts = np.rint(np.cumsum(shares)[:-1] * len(members)).astype(np.int64)
            for part, piece in zip(parts, np.split(members, cuts), strict=True):
                part.append(piece)
        hospitals = [np.concatenate(part) for part in parts]
        if min(map(len, hospitals)) >= wanted:
            return hospitals
    raise ConfigError(
        f"dirichlet:{alpha:g} leaves some of {num_hospitals} hospitals with fewer than {wanted} patients",
        why=f"{_DRAWS} draws were tried",
        fix="choose a larger ALPHA or fewer --hospitals",
    )


def _by_group(
    pool: Units, groups: Sequence[str], *, column: str, most: int | None, minimum: int
) -> Partition:
    """One hospital per value, in sort order of the values; too small and blank ones are left out."""
    values = np.array(groups, dtype=str)
    left_out = []
    found: dict[str, Units] = {}
    for value in sorted(set(values[pool].tolist())):
        members = pool[values[pool] == value]
        if not value:
            left_out.append(LeftOut("(blank)", f"{column} is blank for {len(members)} patients"))
        elif len(members) < minimum:
            left_out.append(_too_few(value, len(members), minimum))
        else:
            found[_free_name(value, found)] = members
    if most is not None and len(found) > most:
        kept = sorted(found, key=lambda name: -len(found[name]))[:most]
        left_out += [LeftOut(name, f"not among the {most} largest") for name in found if name not in kept]
        found = {name: units for name, units in found.items() if name in kept}
    if not found:
        raise ConfigError(
            f"no value of {column} has the {minimum} patients that a hospital needs",
            why="; ".join(f"{entry.name}: {entry.reason}" for entry in left_out[:4]),
            fix="choose another column, or --partition iid",
        )
    return Partition(found, tuple(left_out))


def _free_name(value: str, taken: dict[str, Units]) -> str:
    name = slug(value)
    candidates = (name, *(f"{name}-{number}" for number in range(2, len(taken) + 3)))
    return next(candidate for candidate in candidates if candidate not in taken)


def _too_few(name: str, patients: int, minimum: int) -> LeftOut:
    noun = "patient" if patients == 1 else "patients"
    return LeftOut(name, f"{patients} {noun} to train on, at least {minimum} are needed")


def _alpha(text: str, argument: str) -> float:
    try:
        alpha = float(argument)
    except ValueError:
        alpha = 0.0
    if not 0 < alpha < float("inf"):
        raise _unknown(text, f"ALPHA must be a number above 0, got {argument!r}")
    return alpha


def _unknown(text: str, why: str) -> ConfigError:
    return ConfigError(f"--partition {text!r} cannot be used", why=why, fix=f"write {_FORMS}")
