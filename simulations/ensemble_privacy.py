"""What all members of an ensemble together have cost the patients: every member is charged.

Each simulated run has ledgers of its own, which know nothing of another run's, though its patients are the
same. So the charges of all members are put one after the other here and composed by the project's accountant.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.images.dataset import HospitalImages, read_hospital_images
from client.ledger.ledger import Ledger
from client.ledger.records import Charge
from common.errors import ConfigError
from common.examples import Examples
from common.hospital_config import DataConfig
from common.preprocessing import Preprocessing
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyEvent
from simulations.ensemble_members import Member
from simulations.ledgers import charged
from simulations.preparation import HOSPITALS

RULE = (
    "All charges of all members that hold a hospital's patients, composed (PLD), at the smallest delta of "
    "any; training and validation patients apart, as nobody is both."
)


@dataclass(frozen=True, kw_only=True)
class HospitalCost:
    """What the members have cost one hospital's patients."""

    name: str
    members: Mapping[str, float | None]
    """By member that trained there: epsilon as it states it; None where it claims none."""
    epsilon: float | None
    """Of all of them together; None where one of them claims no privacy: then nothing is guaranteed."""
    delta: float | None
    validation_epsilon: float | None
    """Of the members' noised counts about validation patients; None as above, or without any."""


def composed_costs(members: Sequence[Member]) -> list[HospitalCost]:
    """Every hospital's cost, in the order in which the members name them.

    Raises ConfigError where a hospital of one name has other patients in another member: then nobody could
    say whose charges add up. Raises LedgerError for a private run without its ledgers.
    """
    names = dict.fromkeys(name for member in members for name in member.hospitals)
    return [_of_hospital(name, [m for m in members if name in m.hospitals]) for name in names]


def to_dict(costs: Sequence[HospitalCost]) -> dict[str, Any]:
    """The block `privacy` of ensemble.json."""
    known = [cost.epsilon for cost in costs]
    sure = [value for value in known if value is not None]
    return {
        "rule": RULE,
        "private": len(sure) == len(known),
        "epsilon": max(sure) if sure and len(sure) == len(known) else None,
        "hospitals": [asdict(cost) for cost in costs],
    }


@dataclass(frozen=True, eq=False)
class _Behind:
    """What one member has charged a hospital's patients."""

    training: tuple[PrivacyEvent, ...]
    validation: tuple[PrivacyEvent, ...]
    deltas: tuple[float, ...]
    claims: bool


def _of_hospital(name: str, members: Sequence[Member]) -> HospitalCost:
    tables = [_read_part(member, name) for member in members]
    for member, table in zip(members[1:], tables[1:], strict=True):
        if not _same_patients(tables[0], table):
            raise ConfigError(
                f"{name} has other patients in {member.name} than in {members[0].name}",
                why="so nobody could say whose charges add up",
                fix="train all members with the same --data, --partition, --hospitals and --seed",
            )
    behind = [_behind(member, name, table) for member, table in zip(members, tables, strict=True)]
    stated = [charged(member.folder, name, member.run_id) for member in members]
    delta = min((delta for one in behind for delta in one.deltas), default=None)
    trained = _cost([event for one in behind for event in one.training], stated, "epsilon", delta)
    validation = [event for one in behind for event in one.validation]
    scored = _cost(validation, stated, "validation_epsilon", delta) if validation else None
    claims = all(one.claims for one in behind)
    return HospitalCost(
        name=name,
        members={m.name: said.get("epsilon") for m, said in zip(members, stated, strict=True)},
        epsilon=trained if claims else None,
        delta=delta if claims else None,
        validation_epsilon=scored if claims else None,
    )


def _cost(
    events: Sequence[PrivacyEvent], stated: Sequence[Mapping[str, Any]], key: str, delta: float | None
) -> float:
    """Of all events together; not below what a member states, whose own figure may be rounded up."""
    alone = [float(said[key]) for said in stated if said.get(key) is not None]
    return max([0.0 if delta is None else epsilon(events, delta=delta), *alone])


def _behind(member: Member, name: str, table: HospitalImages) -> _Behind:
    """A charge of a cohort that is neither all training nor all validation patients counts for both."""
    if not member.is_private:
        return _Behind((), (), (), claims=False)
    ledger = Ledger.open(member.folder / HOSPITALS / name / "ledger", create=False)
    charges = ledger.charges()
    train, validation = (ledger.cohort(t.unit_ids).digest for t in (table.train, table.validation))
    return _Behind(
        training=_events([c for c in charges if c.cohort_digest != validation]),
        validation=_events([c for c in charges if c.cohort_digest != train]),
        deltas=tuple(charge.delta for charge in charges),
        claims=all(charge.claims_privacy for charge in charges),
    )


def _events(charges: Sequence[Charge]) -> tuple[PrivacyEvent, ...]:
    return tuple(charge.event for charge in charges if charge.event is not None)


def _read_part(member: Member, name: str) -> HospitalImages:
    data = member.config.data
    return read_hospital_images(
        DataConfig(path=str(member.folder / HOSPITALS / name / "data" / "images.npz")),
        preprocessing=Preprocessing.of(member.config),
        classes=data.classes,
        cache_folder=None,
        task=data.task,
        form=data.series_form,
    )


def _same_patients(one: HospitalImages, other: HospitalImages) -> bool:
    """By rows and labels: parts name their patients anew, and members may see other pixels."""
    pairs = ((one.train, other.train), (one.validation, other.validation))
    return all(
        np.array_equal(mine.targets, theirs.targets) and np.array_equal(_order(mine), _order(theirs))
        for mine, theirs in pairs
    )


def _order(examples: Examples) -> NDArray[np.int64]:
    """(rows,) number of each row's patient, counted by first appearance."""
    _, first, inverse = np.unique(examples.units, return_index=True, return_inverse=True)
    place = np.empty(len(first), np.int64)
    place[np.argsort(first)] = np.arange(len(first))
    return place[inverse]
