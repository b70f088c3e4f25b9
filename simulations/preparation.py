"""From a scenario to prepared hospitals on disk: read, hold back, partition, write.

The folder of a run gets `hospitals/<name>/hospital.toml` with each hospital's part, `hospitals/roster.json`,
`held-back.npz` (what the simulation scores on, numbers only) and `scenario.toml`. No patient id and no name
of an image is in any of them.
"""

import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from client.images.decoded import DecodedRecords
from client.images.parts import write_part
from client.images.records import Unit
from common.config import FederationConfig
from common.errors import ConfigError
from common.examples import Examples
from common.files import write_bytes_atomically, write_json_atomically
from common.hospital_config import (
    DataConfig,
    HospitalConfig,
    HospitalSection,
    PolicyConfig,
    ReleaseConfig,
    SiteConfig,
)
from common.models.names import MODELS, steps_problem
from common.preprocessing import Preprocessing
from common.server_settings import RuntimeSection
from common.settings import to_toml
from simulations.held_back import HeldBack, deal_validation, hold_back, write_held_back
from simulations.partition import LeftOut, Partition, majority_labels, partition_units
from simulations.reading import read_images
from simulations.scenario import DEFAULT_EPSILON, DEFAULT_HOSPITALS, DataFacts, Scenario, settle

HOSPITALS, ROSTER, HELD_BACK, SCENARIO = "hospitals", "roster.json", "held-back.npz", "scenario.toml"
MINIMUM_PATIENTS = 2
MINIMUM_PATIENTS_PRIVATE = 4
"""With fewer patients, the noise that hides one of them hides everything."""


@dataclass(frozen=True, kw_only=True)
class PreparedHospital:
    """A hospital of the roster; the counts are the simulation's, no hospital tells them."""

    name: str
    patients: int
    images: int
    enrolled_patients: int


@dataclass(frozen=True, kw_only=True)
class Prepared:
    """A run folder that is ready to train in."""

    folder: Path
    config: FederationConfig
    facts: DataFacts
    hospitals: tuple[PreparedHospital, ...]
    left_out: tuple[LeftOut, ...]
    held_back: HeldBack
    notes: tuple[str, ...]
    """What a person should know about the data: layout, skipped images, where the cache is."""


def prepare(scenario: Scenario) -> Prepared:
    """Make the run folder of a scenario; raises ConfigError and DataError before anything is written."""
    folder = new_run_folder(scenario)
    images = read_images(scenario)
    spec = scenario.partition_spec
    groups = _groups(images.decoded, spec.column) if spec.finds_hospitals else None
    split = hold_back(images.decoded, groups=groups, seed=scenario.seed)
    labels = majority_labels(
        images.decoded.examples.targets,
        images.decoded.examples.units,
        num_units=images.decoded.examples.num_units,
    )
    partition = partition_units(
        spec,
        labels=labels[split.train],
        groups=None if groups is None else [groups[unit] for unit in split.train],
        num_hospitals=scenario.hospitals or (None if spec.finds_hospitals else DEFAULT_HOSPITALS),
        minimum_units=MINIMUM_PATIENTS_PRIVATE if scenario.private else MINIMUM_PATIENTS,
        seed=scenario.seed,
    )
    partition = Partition(
        {name: split.train[units] for name, units in partition.hospitals.items()}, partition.left_out
    )
    sizes = sorted(len(units) for units in partition.hospitals.values())
    facts = DataFacts(
        name=images.name,
        classes=images.decoded.classes,
        unit=images.decoded.unit,
        image_size=images.preprocessing.image_size,
        channels=images.preprocessing.channels,
        units_per_hospital=sizes[len(sizes) // 2],
        form=images.form,
    )
    held_back = HeldBack.of(
        images.decoded,
        split,
        groups=groups,
        partition=partition,
        columns={"sex": scenario.sex_column, "age": scenario.age_column},
    )
    config = with_folder(settle(scenario, facts), folder, num_hospitals=len(partition.hospitals))
    _check_hospitals_can_follow(scenario, config, unit=facts.unit)
    folder.mkdir(parents=True, exist_ok=True)
    validation = deal_validation(split, groups=groups, partition=partition, seed=scenario.seed)
    hospitals = tuple(
        write_hospital(
            folder / HOSPITALS,
            name,
            images.decoded.examples.select_units(units),
            validation=images.decoded.examples.select_units(validation[name]),
            scenario=scenario,
            config=config,
            unit=facts.unit,
        )
        for name, units in partition.hospitals.items()
    )
    write_json_atomically(folder / HOSPITALS / ROSTER, {"hospitals": [h.name for h in hospitals]})
    write_held_back(folder / HELD_BACK, held_back)
    write_bytes_atomically(folder / SCENARIO, to_toml(scenario).encode())
    return Prepared(
        folder=folder,
        config=config,
        facts=facts,
        hospitals=hospitals,
        left_out=partition.left_out,
        held_back=held_back,
        notes=images.notes,
    )


def new_run_folder(scenario: Scenario) -> Path:
    """Where the run goes: `--out`, or a new name under `runs/`; raises ConfigError when a run is there."""
    if scenario.out:
        folder = Path(scenario.out).absolute()
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(
                f"--out {scenario.out} is not an empty folder",
                why="a run never writes over another one",
                fix=f"name a new folder, or continue it: flower-simulate resume {scenario.out}",
            )
        return folder
    name = Path(scenario.data).resolve().stem.lower() if scenario.data else "phantoms"
    return Path("runs").absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{name}-{os.getpid()}"


def with_folder(config: FederationConfig, folder: Path, *, num_hospitals: int) -> FederationConfig:
    """The configuration with this run's folders, and all hospitals to wait for."""
    runtime = RuntimeSection(
        run_folder=str(folder),
        hospitals=str(folder / HOSPITALS),
        expected_hospitals=num_hospitals,
        initial_weights=config.runtime.initial_weights,
    )
    return config.model_copy(update={"runtime": runtime})


def enrolled(patients: int) -> int:
    """The public count of a hospital: rounded up to tens, from a thousand on to two significant digits.

    Up, so that delta = 1 / (10 * enrolled) is never above 1 / (10 n). Examples: 7 -> 10, 753 -> 760.
    """
    step = int(10 ** max(1, len(str(patients)) - 2))
    return -(-patients // step) * step


def write_hospital(
    hospitals: Path,
    name: str,
    train: Examples,
    *,
    validation: Examples | None = None,
    scenario: Scenario,
    config: FederationConfig,
    unit: Unit,
) -> PreparedHospital:
    """Write one hospital: its images as one part and `hospital.toml`; ledger and state come beside it.

    Without validation patients it releases no metrics: here everybody knows that they would be noise alone.
    """
    folder = hospitals / name
    folder.mkdir(parents=True, mode=0o700)
    part = write_part(
        folder / "data" / "images.npz",
        train=train,
        validation=validation,
        classes=config.data.classes,
        unit=unit,
        mark=Preprocessing.of(config).mark,
    )
    hospital = HospitalConfig(
        hospital=HospitalSection(name=name, enrolled_patients=enrolled(train.num_units)),
        data=DataConfig(path=str(part), classes=config.data.classes),
        policy=PolicyConfig(
            epsilon=scenario.epsilon or DEFAULT_EPSILON,
            delta=scenario.delta,
            minimum_patients=MINIMUM_PATIENTS,
            allow_non_private=not config.claims_privacy,
        ),
        release=ReleaseConfig()
        if validation is not None and validation.num_units
        else ReleaseConfig(metrics=()),
        site=SiteConfig(device=scenario.device, ledger="ledger"),
    )
    write_bytes_atomically(folder / "hospital.toml", to_toml(hospital).encode(), mode=0o600)
    return PreparedHospital(
        name=name,
        patients=train.num_units,
        images=train.num_rows,
        enrolled_patients=hospital.hospital.enrolled_patients,
    )


def relocate(folder: Path) -> None:
    """Point each hospital at its images again after the run folder has been moved."""
    from common.settings import load

    for name in roster(folder):
        path = folder / HOSPITALS / name / "hospital.toml"
        hospital = load(HospitalConfig, path)
        part = str(path.parent / "data" / "images.npz")
        if hospital.data.path != part:
            moved = hospital.model_copy(update={"data": hospital.data.model_copy(update={"path": part})})
            write_bytes_atomically(path, to_toml(moved).encode(), mode=0o600)


def roster(folder: Path) -> list[str]:
    """Names of the hospitals of a run folder; raises ConfigError when it is none."""
    try:
        names = json.loads((folder / HOSPITALS / ROSTER).read_text())["hospitals"]
    except (OSError, ValueError, KeyError):
        raise ConfigError(
            f"{folder} is not the folder of a simulation",
            why=f"it holds no {HOSPITALS}/{ROSTER}",
            fix="name the folder that `flower-simulate run` has printed",
        ) from None
    return [str(name) for name in names]


def _groups(decoded: DecodedRecords, column: str) -> Sequence[str]:
    by_plain = {name.casefold(): name for name in reversed(list(decoded.groups))}
    found = column if column in decoded.groups else by_plain.get(column.casefold())
    if found is None:
        known = ", ".join(sorted(decoded.groups)) or "none"
        raise ConfigError(
            f"the data have no column {column!r} to partition by",
            why=f"columns are: {known}",
            fix="choose one of them, or --partition iid",
        )
    return decoded.unit_groups(found)


def _check_hospitals_can_follow(scenario: Scenario, config: FederationConfig, *, unit: str) -> None:
    """Refuse early what every hospital's policy would refuse in round 1."""
    if scenario.private != config.federation.private:
        raise ConfigError(
            "--private and --set federation.private contradict each other", fix="use --private only"
        )
    if config.data.unit == "patient" and unit == "image":
        raise ConfigError(
            "data.unit = 'patient' cannot be promised",
            why="these images name no patients, so what is protected is one image",
            fix="name the patients with --patient-column, or leave data.unit as it is",
        )
    known = MODELS.get(config.model.name)
    if known is None:
        raise ConfigError(
            f"there is no model {config.model.name!r}", fix=f"choose one of {', '.join(MODELS)}"
        )
    if config.data.image_size < known.minimum_image_size:
        raise ConfigError(
            f"images of {config.data.image_size} px are too small for {config.model.name}",
            why=f"its layers need at least {known.minimum_image_size} px",
            fix=f"use --image-size {known.minimum_image_size} or more, or --model softmax",
        )
    if problem := steps_problem(config.model.name, config.model_spec.steps):
        raise ConfigError(problem, fix="choose another --model, or other data")
