"""The runs of an ensemble: read from their folders, and refused where they do not share their patients."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from common.config import FederationConfig
from common.errors import ConfigError
from common.preprocessing import Preprocessing
from common.series import IMAGE
from common.settings import load
from simulations.held_back import HeldBack, ScoredSet, read_held_back
from simulations.predictions import MODEL
from simulations.preparation import HELD_BACK, SCENARIO, roster, with_folder
from simulations.scenario import DEFAULT_HOSPITALS, Scenario
from simulations.scoring import RESULT, read_json
from simulations.ways import CENTRAL_HOSPITAL

AVERAGE, STACKING = "average", "stacking"
"""Names beside those of the members."""
_MAY_DIFFER = {
    *("model", "rounds", "local_steps", "image_size", "channels", "steps"),
    *("private", "epsilon", "delta", "reproducible", "engine", "device", "out", "set"),
}
"""Flags that decide about training or pixels, not about who is held back and who is in which hospital."""


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Member:
    """One finished run."""

    name: str
    """Unique among the members."""
    folder: Path
    config: FederationConfig
    scenario: Scenario
    hospitals: tuple[str, ...]
    held_back: HeldBack
    result: dict[str, Any]

    @property
    def run_id(self) -> str:
        """The run's own name."""
        return str(self.result["run_id"])

    @property
    def is_private(self) -> bool:
        """Whether the run claims differential privacy."""
        return bool(self.result["private"])


def read_members(folders: Sequence[Path]) -> list[Member]:
    """The members in this order. Raises ConfigError unless all were scored on the same patients."""
    real = [folder.resolve() for folder in folders]
    if len(real) < 2 or len(set(real)) < len(real):
        raise ConfigError("an ensemble needs two or more different runs", fix="name each run folder once")
    short = {folder.name for folder in real}
    unclear = len(short) < len(real) or short & {AVERAGE, STACKING}
    names = [str(folder) if unclear else folder.name for folder in real]
    members = [_read(name, folder) for name, folder in zip(names, real, strict=True)]
    if len({member.run_id for member in members}) < len(members):
        raise ConfigError("two of the folders hold the same run", fix="name each run once")
    for other in members[1:]:
        if problem := _difference(members[0], other):
            raise ConfigError(
                f"{members[0].name} and {other.name} do not share their patients",
                why=problem,
                fix="train the members with the same --data, --partition and --seed; to vary their first "
                "weights use --set federation.seed=N",
            )
    return members


def _read(name: str, folder: Path) -> Member:
    hospitals = roster(folder)
    result = read_json(folder / RESULT)
    if not (folder / MODEL).is_file() or not result:
        raise ConfigError(
            f"{folder} holds no finished model",
            why="the run has not come to its end",
            fix=f"flower-simulate resume {folder}",
        )
    config = load(FederationConfig, folder / "config.toml")
    return Member(
        name=name,
        folder=folder,
        config=with_folder(config, folder, num_hospitals=len(hospitals)),
        scenario=load(Scenario, folder / SCENARIO),
        hospitals=tuple(hospitals),
        held_back=read_held_back(folder / HELD_BACK),
        result=result,
    )


def _difference(one: Member, other: Member) -> str:
    """Why two runs cannot be averaged, in words; empty where they can."""
    who, others = _who(one.scenario), _who(other.scenario)
    if flags := [name for name in sorted(who) if who[name] != others[name]]:
        named = ", ".join(f"--{name.replace('_', '-')}" for name in flags)
        return f"they were started with another {named}"
    mine, theirs = (member.config.data for member in (one, other))
    if (mine.task, mine.classes, mine.unit) != (theirs.task, theirs.classes, theirs.unit):
        return "their task, classes or unit of protection differ"
    if (CENTRAL_HOSPITAL in one.hospitals) != (CENTRAL_HOSPITAL in other.hospitals):
        return "one was trained centrally: its patients cannot be told apart by hospital"
    sets = one.held_back.sets, other.held_back.sets
    same_pixels = Preprocessing.of(one.config) == Preprocessing.of(other.config)
    if sets[0].keys() != sets[1].keys() or not all(
        _same_patients(sets[0][split], sets[1][split], pixels=same_pixels) for split in sets[0]
    ):
        return "the held-back patients differ"
    return ""


def _who(scenario: Scenario) -> dict[str, Any]:
    """What decides about who is in which hospital and who is held back, defaults filled in."""
    spec = scenario.partition_spec
    hospitals = scenario.hospitals or (None if spec.finds_hospitals else DEFAULT_HOSPITALS)
    data = str(Path(scenario.data).resolve()) if scenario.data else ""
    chosen = {"partition": spec, "hospitals": hospitals, "data": data, "task": scenario.task_name}
    return scenario.model_dump(exclude=_MAY_DIFFER) | chosen


def _same_patients(one: ScoredSet, other: ScoredSet, *, pixels: bool) -> bool:
    same = np.array_equal(one.targets, other.targets) and np.array_equal(one.units, other.units)
    return same and (not pixels or np.array_equal(one.inputs[IMAGE], other.inputs[IMAGE]))
