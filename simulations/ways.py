"""The ways to train that a comparison sets side by side, each prepared from the same hospitals' parts.

Partition, split and seed are those of one preparation; a way only chooses which hospitals train together and
whether their training is private.
"""

import os
import shutil
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np

from client.images.dataset import read_hospital_images
from common.config import FederationConfig
from common.examples import Examples, concatenate
from common.files import write_bytes_atomically, write_json_atomically
from common.hospital_config import DataConfig, HospitalConfig
from common.preprocessing import Preprocessing
from common.settings import load, to_toml
from simulations.held_back import HeldBack, write_held_back
from simulations.preparation import (
    HELD_BACK,
    HOSPITALS,
    ROSTER,
    SCENARIO,
    Prepared,
    with_folder,
    write_hospital,
)
from simulations.scenario import Scenario, settle

Kind = Literal["central", "alone", "federated"]
CENTRAL_HOSPITAL = "all-patients"


@dataclass(frozen=True, kw_only=True)
class Way:
    """Who trains together, and under which epsilon."""

    kind: Kind
    members: tuple[str, ...]
    """Hospitals of the preparation whose patients take part."""
    epsilon: float | None = None
    """Budget of each hospital; None trains without privacy."""
    baseline: str = ""
    """Classical method that stands in for the model (`simulations.baselines`); empty is the model itself."""

    @property
    def name(self) -> str:
        """Unique; also the name of its run folder."""
        who = self.members[0] if self.kind == "alone" else ""
        method = f"baseline-{self.baseline.lower().replace(' ', '-')}" if self.baseline else ""
        parts = [method, self.kind, who, "" if self.epsilon is None else f"epsilon-{self.epsilon:g}"]
        return "-".join(part for part in parts if part)

    @property
    def title(self) -> str:
        """For tables."""
        privacy = "" if self.epsilon is None else f", epsilon {self.epsilon:g}"
        whose = {"central": "central", "alone": f"{self.members[0]} alone", "federated": "federated"}
        method = f"{self.baseline}, " if self.baseline else ""
        return method + whose[self.kind] + privacy


def ways_to_compare(
    hospitals: Sequence[str], *, epsilons: Sequence[float], alone_private: bool = False
) -> tuple[Way, ...]:
    """Central, each alone, federated, federated at each epsilon; `alone_private` adds each alone at each."""
    everybody = tuple(hospitals)
    ways = [
        Way(kind="central", members=everybody),
        *(Way(kind="alone", members=(name,)) for name in hospitals),
        Way(kind="federated", members=everybody),
    ]
    for epsilon in epsilons:
        if alone_private:
            ways += [Way(kind="alone", members=(name,), epsilon=epsilon) for name in hospitals]
        ways.append(Way(kind="federated", members=everybody, epsilon=epsilon))
    return tuple(ways)


def baseline_ways(hospitals: Sequence[str], methods: Sequence[str]) -> tuple[Way, ...]:
    """Each classical method on all patients together, then on each hospital's; never private."""
    return tuple(
        way
        for method in methods
        for way in (
            Way(kind="central", members=tuple(hospitals), baseline=method),
            *(Way(kind="alone", members=(name,), baseline=method) for name in hospitals),
        )
    )


def prepare_way(
    base: Prepared, way: Way, scenario: Scenario, folder: Path
) -> tuple[FederationConfig, Scenario]:
    """Make the run folder of one way; gives what `train_in` needs.

    Settings that were not asked for are the recommended ones for this way's privacy and number of patients.
    """
    patients = [hospital.patients for hospital in base.hospitals if hospital.name in way.members]
    per_hospital = sum(patients) if way.kind == "central" else int(statistics.median(patients))
    own = scenario.model_copy(
        update={
            "private": way.epsilon is not None,
            "epsilon": way.epsilon,
            "delta": scenario.delta if way.epsilon is not None else None,
            "out": str(folder),
        }
    )
    names = (CENTRAL_HOSPITAL,) if way.kind == "central" else way.members
    facts = replace(base.facts, units_per_hospital=per_hospital)
    config = with_folder(settle(own, facts), folder, num_hospitals=len(names))
    folder.mkdir(parents=True)
    if way.kind == "central":
        write_hospital(
            folder / HOSPITALS,
            CENTRAL_HOSPITAL,
            merged(base),
            scenario=own,
            config=config,
            unit=base.facts.unit,
        )
    else:
        for name in names:
            _link_hospital(base, name, folder / HOSPITALS / name, own, config)
    write_json_atomically(folder / HOSPITALS / ROSTER, {"hospitals": list(names)})
    write_held_back(folder / HELD_BACK, _renumbered(base, names))
    write_bytes_atomically(folder / SCENARIO, to_toml(own).encode())
    return config, own


def merged(base: Prepared) -> Examples:
    """The training patients of all hospitals in one table."""
    return concatenate([training_examples(base, hospital.name) for hospital in base.hospitals])


def training_examples(base: Prepared, hospital: str) -> Examples:
    """The training patients of one hospital of a preparation."""
    images = read_hospital_images(
        DataConfig(path=str(base.folder / HOSPITALS / hospital / "data" / "images.npz")),
        preprocessing=Preprocessing.of(base.config),
        classes=base.facts.classes,
        cache_folder=None,
        task=base.config.data.task,
        form=base.facts.form,
    )
    return images.train


def _link_hospital(
    base: Prepared, name: str, folder: Path, scenario: Scenario, config: FederationConfig
) -> None:
    """The same images under this way's policy, without a second copy on disk where that is possible."""
    source = base.folder / HOSPITALS / name
    part = folder / "data" / "images.npz"
    folder.mkdir(parents=True, mode=0o700)
    part.parent.mkdir()
    try:
        os.link(source / "data" / "images.npz", part)
    except OSError:
        shutil.copy2(source / "data" / "images.npz", part)
    hospital = load(HospitalConfig, source / "hospital.toml")
    policy = hospital.policy.model_copy(
        update={
            "epsilon": scenario.epsilon or hospital.policy.epsilon,
            "delta": scenario.delta,
            "allow_non_private": not config.claims_privacy,
        }
    )
    data = hospital.data.model_copy(update={"path": str(part)})
    own = hospital.model_copy(update={"policy": policy, "data": data})
    write_bytes_atomically(folder / "hospital.toml", to_toml(own).encode())


def _renumbered(base: Prepared, names: Sequence[str]) -> HeldBack:
    """The held-back rows, with hospitals as positions on this way's roster."""
    before = [hospital.name for hospital in base.hospitals]
    position = np.array([names.index(name) if name in names else -1 for name in before] + [-1], np.int64)
    sets = {
        split: replace(scored, hospitals=position[scored.hospitals])
        for split, scored in base.held_back.sets.items()
    }
    return replace(base.held_back, sets=sets)
