"""Whom `flower-client plan` plans for: a hospital, its study, and what its patients have behind them.

The ledger is looked at and never written, and images are read only where it holds charges: to know what they
protect and, where composition is by patient, whether these are the same ones. What a flag names replaces what
the files say.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from client.deployment.hospital_folder import HOSPITAL_TOML, HospitalFolder
from client.limits import Histories
from client.planning.outlook import Begun, Outlook, look_ahead
from common.config import DataContract, PublicPlan
from common.errors import ConfigError, LedgerError
from common.hospital_config import HospitalConfig
from common.privacy.plan import Unit
from common.settings import Section, parse, to_nested

Changes = Mapping[str, Any]
"""`section.key` (kebab-case) -> value; None leaves what is there."""
S = TypeVar("S", bound=Section)
_SOURCE = "flower-client plan"


@dataclass(frozen=True, kw_only=True)
class PlannedHospital:
    """A hospital and a study, as they would meet in a new run."""

    config: HospitalConfig
    study: PublicPlan
    unit: Unit
    histories: Histories = field(repr=False)
    """What these patients have behind them; private."""
    study_from: str
    """Where the study's numbers come from, in words."""
    ledger: str
    """What was asked about earlier runs, in words."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """How long one private step takes on this machine."""

    seconds: float
    device: str


def planned_hospital(
    folder: Path,
    *,
    hospital_changes: Changes,
    study_changes: Changes,
    with_ledger: bool = True,
    say: Callable[[str], None] = lambda _: None,
) -> PlannedHospital:
    """Read `folder`, or plan from the changes alone where it has no hospital.toml.

    Raises ConfigError, DataError for images that cannot be used, LedgerError for a damaged ledger.
    """
    if not (folder / HOSPITAL_TOML).exists():
        return _without_folder(folder, hospital_changes, study_changes)
    hospital = HospitalFolder(folder)
    study, study_from = _study(hospital)
    histories: Histories = [()]
    ledger, unit = "not asked: as for new patients (--without-ledger)", study.data.unit
    if with_ledger:
        say("the ledger, and whose images these are")
        histories, unit, ledger = behind_these_patients(hospital, study)
    return PlannedHospital(
        config=_changed(hospital.config, hospital_changes),
        study=_changed(study, study_changes),
        unit=unit,
        histories=histories,
        study_from=_named(study_from, hospital_changes, study_changes),
        ledger=ledger,
    )


def outlook_of_run(hospital: HospitalFolder, run_id: str, plan: PublicPlan) -> Outlook:
    """What this run will have cost by its end, with what it has charged already. Raises FederationError."""
    histories, unit, _ = behind_these_patients(hospital, plan)
    return look_ahead(hospital.config, plan, histories, unit=unit, begun=_begun(hospital, run_id))


def measured_step(config: HospitalConfig, study: PublicPlan) -> StepTime:
    """Measure a private step of the study on random images. Raises FederationError where it does not run."""
    import torch

    from client.device import resolve_device
    from client.provisioning.dry_step import dry_step_seconds

    device = resolve_device(config.site.device)
    if config.site.threads:
        torch.set_num_threads(config.site.threads)
    seconds = dry_step_seconds(study, enrolled_patients=config.hospital.enrolled_patients, device=device)
    threads = f"cpu, {torch.get_num_threads()} thread(s)"
    return StepTime(
        seconds=seconds, device=torch.cuda.get_device_name(device) if device.type == "cuda" else threads
    )


def num_parameters(study: PublicPlan) -> int:
    """Weights of the study's model. Raises ModelError."""
    import math

    from common.models.registry import parameter_template

    return sum(math.prod(shape) for shape in parameter_template(study.model_spec).values())


def _without_folder(folder: Path, hospital_changes: Changes, study_changes: Changes) -> PlannedHospital:
    if hospital_changes.get("hospital.enrolled-patients") is None:
        raise ConfigError(
            f"there is no {HOSPITAL_TOML} in {folder.resolve()}",
            why="a plan needs to know how many patients are enrolled",
            fix="name the hospital's folder, or say it: flower-client plan --patients 940",
        )
    values = {"hospital": {"name": "hospital"}, "data": {"path": ""}}
    config = parse(HospitalConfig, _put(values, hospital_changes), source=_SOURCE)
    study = _changed(PublicPlan(), study_changes)
    return PlannedHospital(
        config=config,
        study=study,
        unit=study.data.unit,
        histories=[()],
        study_from=_named("the defaults", {}, study_changes),
        ledger=f"none: there is no {HOSPITAL_TOML}, so these are new patients",
    )


def _study(hospital: HospitalFolder) -> tuple[PublicPlan, str]:
    """The study of the enrolment, else the defaults with this hospital's own classes."""
    if hospital.enrolment_file.exists():
        return hospital.enrolment().plan, hospital.enrolment_file.name
    classes = hospital.config.data.classes
    data = DataContract(classes=classes) if classes else DataContract()
    return PublicPlan(data=data), f"the defaults (no {hospital.enrolment_file.name} yet)"


def behind_these_patients(hospital: HospitalFolder, study: PublicPlan) -> tuple[Histories, Unit, str]:
    """Histories as `client.round` asks for them, the unit of these images, and that in words.

    Nothing is written. Raises LedgerError for a damaged ledger, DataError for images that cannot be used.
    """
    from client.images.dataset import read_hospital_images
    from client.images.splits import split_key
    from client.ledger.contradiction import has_ledger, require_borne_out, require_not_gone
    from client.ledger.ledger import Ledger
    from common.preprocessing import Preprocessing

    config, path = hospital.config, hospital.config.ledger_folder(hospital.path)
    require_not_gone(path, hospital.state)
    if not has_ledger(path):
        return [()], study.data.unit, "none yet"
    ledger = Ledger.examine(path)
    if damage := ledger.damage():
        raise LedgerError(
            f"the ledger in {path} cannot be planned with",
            why=damage[0].message,
            fix=f"flower-client ledger verify {path}; restore its newest backup, or see what "
            f"`flower-client ledger recover {hospital.path}` can do from receipts",
        )
    require_borne_out(ledger, hospital.state)
    if not ledger.charges():
        return [()], study.data.unit, "empty"
    is_enrolled = hospital.enrolment_file.exists()
    images = read_hospital_images(
        config.data,
        preprocessing=Preprocessing(image_size=study.data.image_size, channels=study.data.channels),
        classes=study.data.classes if is_enrolled else config.data.classes or None,
        cache_folder=hospital.path / (config.site.cache or "cache"),
        split_key=split_key(ledger.site_key),
        task=study.data.task,
    )
    by = config.policy.composition
    histories = ledger.histories(ledger.cohort(images.train.unit_ids), composition=by)
    runs = len({charge.key.run_id for charge in ledger.charges()})
    compared = {
        "patient": f"compared with the {images.unit}s that would train",
        "site": f'all counted for every {images.unit} (policy.composition = "site")',
    }
    return histories, images.unit, f"{runs} run(s), {compared[by]}"


def _begun(hospital: HospitalFolder, run_id: str) -> Begun:
    from client.ledger.contradiction import has_ledger
    from client.ledger.ledger import Ledger
    from client.ledger.records import TRAINING

    path = hospital.config.ledger_folder(hospital.path)
    if not has_ledger(path):
        return Begun()
    own = [c for c in Ledger.examine(path).charges() if c.key.run_id == run_id and c.purpose == TRAINING]
    events = [charge.event for charge in own if charge.event is not None]
    return Begun(
        rounds=max((charge.key.round_number for charge in own), default=0),
        events=events,
        noise_multiplier=events[-1].noise_multiplier if events else None,
    )


def _changed(config: S, changes: Changes) -> S:
    return parse(type(config), _put(to_nested(config), changes), source=_SOURCE)


def _put(values: dict[str, Any], changes: Changes) -> dict[str, Any]:
    for dotted, value in changes.items():
        if value is not None:
            section, key = dotted.split(".")
            values.setdefault(section, {})[key] = value
    return values


def _named(source: str, *changes: Changes) -> str:
    changed = [key for some in changes for key, value in some.items() if value is not None]
    return f"{source}, with other {', '.join(changed)}" if changed else source
