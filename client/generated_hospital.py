"""A hospital with X-ray phantoms, for a bare `flwr run .`: every Flower node makes its own."""

from pathlib import Path

import numpy as np

from client.images.parts import write_part
from client.images.phantoms import CLASSES, hospital_phantoms
from common.examples import Examples
from common.files import write_bytes_atomically
from common.hospital_config import DataConfig, HospitalConfig, HospitalSection, SiteConfig
from common.settings import to_toml

PATIENTS = 300
IMAGE_SIZE = 28


def write_generated_hospital(folder: Path, *, number: int, seed: int) -> Path:
    """Write phantoms and `hospital.toml` into `folder`; returns the TOML file, written last."""
    phantoms = hospital_phantoms(hospital=number + 1, num_patients=PATIENTS, image_size=IMAGE_SIZE, seed=seed)
    unit_ids, units = np.unique(np.asarray(phantoms.patients), return_inverse=True)
    train = Examples(
        inputs={"image": phantoms.images[:, None]},
        targets=phantoms.labels,
        units=units.astype(np.int64),
        unit_ids=tuple(unit_ids.tolist()),
    )
    part = write_part(folder / "data" / "phantoms.npz", train=train, classes=CLASSES, unit="patient")
    config = HospitalConfig(
        hospital=HospitalSection(name=f"hospital-{number + 1}", enrolled_patients=PATIENTS),
        data=DataConfig(path=str(part), classes=CLASSES),
        site=SiteConfig(ledger="ledger"),
    )
    toml = folder / "hospital.toml"
    write_bytes_atomically(toml, to_toml(config).encode(), mode=0o600)
    return toml
