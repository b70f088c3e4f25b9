"""A hospital on its own machine: configuration, folders, ledger, outbox, images; opened once per process."""

import json
import os
import tempfile
from contextlib import AbstractContextManager
from functools import lru_cache
from pathlib import Path

from flwr.app import Context

from client.approval.approvals import Approvals
from client.generated_hospital import write_generated_hospital
from client.hospital_log import FILE, write_entry
from client.images.dataset import HospitalImages, read_hospital_images
from client.images.splits import split_key
from client.ledger.ledger import Ledger
from client.outbox import Outbox
from client.release import Door
from client.site_lock import site_lock
from common.config import PublicPlan
from common.enrolment import Enrolment
from common.errors import ConfigError
from common.hospital_config import HospitalConfig
from common.preprocessing import Preprocessing
from common.settings import load


class Site:
    """One hospital; made from its `hospital.toml`."""

    def __init__(self, config: HospitalConfig, folder: Path) -> None:
        self.config = config
        self.folder = folder
        self.state_folder = self._folder(config.site.state, "state")
        self.cache_folder = self._folder(config.site.cache, "cache")
        self.models_folder = self.state_folder / "models"
        self.ledger = Ledger.open(config.ledger_folder(folder))
        self.outbox = Outbox(self.state_folder / "outbox")
        self.approvals = Approvals(self.state_folder, hospital=folder)
        self.recipient = _recipient(folder / config.connection.enrolment)
        """To whom answers go: the server's address, or `simulation` where no operator enrolled it."""
        self.door = Door(self.state_folder / "audit.jsonl", recipient=self.recipient)
        self._images: tuple[object, HospitalImages] | None = None

    @property
    def name(self) -> str:
        """Name on the federation's roster."""
        return self.config.hospital.name

    def locked(self) -> AbstractContextManager[None]:
        """One round at a time in this hospital, whatever the number of processes."""
        return site_lock(self.state_folder)

    def images(self, plan: PublicPlan) -> HospitalImages:
        """The hospital's images as the plan wants them, read and decoded once per process."""
        preprocessing = Preprocessing(image_size=plan.data.image_size, channels=plan.data.channels)
        wanted = (preprocessing, plan.data.classes, plan.data.task)
        if self._images is None or self._images[0] != wanted:
            self._images = None  # never two sets in memory, whatever a server asks for
            read = read_hospital_images(
                self.config.data,
                preprocessing=preprocessing,
                classes=plan.data.classes,
                task=plan.data.task,
                cache_folder=self.cache_folder,
                split_key=split_key(self.ledger.site_key),
            )
            self._images = (wanted, read)
        return self._images[1]

    def log_locally(self, error: BaseException) -> None:
        """Write an error to the hospital's own log; it may name files and never leaves. Raises OSError."""
        write_entry(self.state_folder / FILE, error)

    def _folder(self, configured: str, default: str) -> Path:
        folder = Path(configured) if configured else self.folder / default
        folder = folder if folder.is_absolute() else self.folder / folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return folder


def open_site(context: Context) -> Site:
    """Open the hospital that this ClientApp works for.

    A real hospital names its file in the node config (`hospital-config`). A simulation names the folder of
    prepared hospitals in the run config and Flower numbers the nodes. With neither (a bare `flwr run .`), the
    hospital makes X-ray phantoms for this run.
    """
    named = context.node_config.get("hospital-config")
    if named:
        return _site(str(named))
    if "partition-id" not in context.node_config:
        raise ConfigError(
            "this node does not know which hospital it is",
            fix="start it with node config hospital-config=PATH of hospital.toml",
        )
    number = int(context.node_config["partition-id"])
    hospitals = str(context.run_config.get("runtime.hospitals", ""))
    if hospitals:
        return _site(str(Path(hospitals) / _roster(hospitals)[number] / "hospital.toml"))
    return _site(str(_generated_hospital(number, context.run_id)))


def _recipient(enrolment: Path) -> str:
    if not enrolment.exists():
        return "simulation"
    try:
        return load(Enrolment, enrolment).address
    except (ConfigError, OSError):  # it is complained about where it is needed
        return "unknown"


@lru_cache(maxsize=4)
def _roster(hospitals: str) -> tuple[str, ...]:
    """Names of a simulation's hospitals, read once: they stay as they are for the whole run."""
    return tuple(json.loads((Path(hospitals) / "roster.json").read_text())["hospitals"])


@lru_cache(maxsize=64)
def _site(config_file: str) -> Site:
    path = Path(config_file)
    return Site(load(HospitalConfig, path), path.parent)


def _generated_hospital(number: int, run_id: int) -> Path:
    base = Path(tempfile.gettempdir()) / f"hospital-federation-{os.getuid()}" / str(run_id)
    base.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder = base / f"hospital-{number + 1}"
    with site_lock(base):
        toml = folder / "hospital.toml"
        return (
            toml if toml.is_file() else write_generated_hospital(folder, number=number, seed=run_id % 2**31)
        )
