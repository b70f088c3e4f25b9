"""A whole hospital for audits: its folder, ledger and door, asked as a server would ask it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from numpy.typing import NDArray

import client.app
from client.images.parts import write_part
from client.ledger.ledger import Ledger
from client.ledger.records import Charge
from common import messages
from common.config import PublicPlan
from common.examples import Examples
from common.hospital_config import HospitalConfig
from common.messages import Envelope, RoundKey
from common.models.registry import parameter_template
from common.parameters import from_record, parameters_sha256, to_record
from common.settings import parse, to_toml
from simulations.audits.chance import Vector

CLASSES = ("negative", "positive")
PATIENTS, ENROLLED = 24, 30
RUN = "audit"
_DAY = 86_400.0


def become_a_task() -> None:
    """Flower makes messages only inside a task: this process is one from now on."""
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1


def make_hospital(
    folder: Path, *, patients: int = PATIENTS, side: int = 64, policy: Mapping[str, Any] | None = None
) -> Path:
    """Write `hospital.toml` and random films, one of each patient, and as many validation patients."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    train, validation = (
        Examples(
            inputs={"image": rng.integers(0, 256, (PATIENTS, 1, side, side), dtype=np.uint8)},
            targets=np.arange(PATIENTS) % 2,
            units=np.arange(PATIENTS),
            unit_ids=tuple(f"{kind}-{number}" for number in range(PATIENTS)),
        )
        for kind in ("train", "validation")
    )
    data = write_part(
        folder / "images.npz",
        train=train.select_units(np.arange(patients)),
        validation=validation,
        classes=CLASSES,
        unit="patient",
    )
    values = {
        "hospital": {"name": "north", "enrolled-patients": ENROLLED},
        "data": {"path": str(data)},
        "policy": {"mode": "fixed", "noise-multiplier": 2.0, "epsilon": 100.0, **(policy or {})},
        "release": {"epsilon": 2.0, "maximum-per-run": 100},
        "site": {"device": "cpu", "ledger": "ledger"},
    }
    (folder / "hospital.toml").write_text(to_toml(parse(HospitalConfig, values, source="audit")))
    return folder / "hospital.toml"


def make_public_plan(*, side: int = 64, rounds: int = 100, **privacy: Any) -> PublicPlan:
    """A run of `softmax` with a step so small that the weights stay where the server put them."""
    values = {
        "federation": {"rounds": rounds},
        "data": {"image-size": side, "classes": CLASSES},
        "model": {"name": "softmax"},
        "training": {"optimizer": "sgd", "learning-rate": 1e-6},
        "evaluation": {"score-bins": 100},
        "privacy": {key.replace("_", "-"): value for key, value in privacy.items()},
    }
    return parse(PublicPlan, values, source="audit")


def zero_weights(plan: PublicPlan) -> dict[str, NDArray[np.float32]]:
    """Weights from which a tiny step shows in full precision."""
    template = parameter_template(plan.model_spec)
    return {name: np.zeros(shape, dtype=np.float32) for name, shape in template.items()}


def ask(toml: Path, plan: PublicPlan, *, kind: str = messages.TRAIN, round_number: int = 1) -> RecordDict:
    """What the hospital's ClientApp answers."""
    weights = zero_weights(plan)
    key = RoundKey(run_id=RUN, attempt=1, round_number=round_number, model_hash=parameters_sha256(weights))
    content = RecordDict(
        {
            messages.ENVELOPE: Envelope(key=key).to_record(),
            messages.ARRAYS: to_record(weights),
            messages.REQUEST: messages.plan_to_record(plan),
        }
    )
    context = Context(
        run_id=1, node_id=7, node_config={"hospital-config": str(toml)}, state=RecordDict(), run_config={}
    )
    reply = client.app.app(Message(content, 7, kind, ttl=_DAY), context)
    if reply.has_error() or messages.REFUSAL in reply.content:
        code = None if reply.has_error() else messages.refusal_code(reply.content)
        raise RuntimeError(f"the hospital of the audit did not answer: {code}")
    return reply.content


def summed_update(answer: RecordDict, plan: PublicPlan) -> Vector:
    """What an answer's weights say of the sum over its steps of noisy sums, flat over all parameters."""
    template = parameter_template(plan.model_spec)
    delta = from_record(messages.arrays_of(answer), template)
    flat = np.concatenate([delta[name].astype(np.float64).ravel() for name in template])
    return -flat * (plan.privacy.sampling_rate * ENROLLED) / plan.training.learning_rate


def counts_of(answer: RecordDict) -> Vector:
    """All counts of an evaluation, flat."""
    record = answer[messages.COUNTS]
    return np.concatenate([np.asarray(values, dtype=np.float64) for _, values in sorted(record.items())])


def charges(toml: Path, *, purpose: str) -> list[Charge]:
    """What stands in the hospital's ledger."""
    ledger = Ledger.examine(toml.parent / "ledger", create=True)
    return [charge for charge in ledger.charges() if charge.purpose == purpose]
