"""A hospital of a few tiny pictures on disk, and a server's messages to it: `client.app` from outside."""

import os
from pathlib import Path

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.app import app
from client.fault_points import VARIABLE
from client.images.parts import write_part
from client.ledger.ledger import Ledger
from common import messages
from common.config import PublicPlan
from common.examples import Examples
from common.hospital_config import HospitalConfig
from common.messages import Envelope, RoundKey
from common.models.registry import initial_parameters
from common.parameters import parameters_sha256, to_record
from common.settings import parse, to_toml

SIZE, PATIENTS, ENROLLED = 8, 24, 30
CLASSES = ("negative", "positive")


def make_hospital(
    folder: Path,
    *,
    name="north",
    unit="patient",
    data="",
    validation_share=0.0,
    classes=(),
    site=None,
    **policy,
) -> Path:
    """Write `hospital.toml` and, unless `data` names some, 24 patients with one to three pictures each.

    Without another `mode` its noise is given, because solving for it takes seconds.
    """
    policy = {"mode": "fixed", "noise_multiplier": 2.0, "epsilon": 50.0, **policy}
    folder.mkdir(parents=True)
    if not data:
        units = np.repeat(np.arange(PATIENTS), 1 + np.arange(PATIENTS) % 3)
        random = np.random.default_rng(len(name))
        train = Examples(
            inputs={"image": random.integers(0, 256, (len(units), 1, SIZE, SIZE), dtype=np.uint8)},
            targets=(units % 2).astype(np.int64),
            units=units.astype(np.int64),
            unit_ids=tuple(f"patient-{number}" for number in range(PATIENTS)),
        )
        data = str(write_part(folder / "data" / "images.npz", train=train, classes=CLASSES, unit=unit))
    values = {
        "hospital": {"name": name, "enrolled-patients": ENROLLED},
        "data": {"path": data, "validation-share": validation_share, "classes": classes},
        "policy": {key.replace("_", "-"): value for key, value in policy.items()},
        "site": {"device": "cpu", "ledger": "ledger", **(site or {})},
    }
    (folder / "hospital.toml").write_text(to_toml(parse(HospitalConfig, values, source="test")))
    return folder / "hospital.toml"


def make_plan(**sections) -> PublicPlan:
    values = {
        "federation": {"rounds": 4},
        "data": {"image-size": SIZE, "classes": CLASSES},
        "model": {"name": "softmax"},
        "privacy": {"local-steps": 2},
    }
    for section, content in sections.items():
        values[section] = {**values.get(section, {}), **content}
    return parse(PublicPlan, values, source="test")


def weights_of(plan: PublicPlan, seed=0) -> dict[str, np.ndarray]:
    return initial_parameters(plan.model_spec, seed)


def envelope_of(weights, *, round_number=1, run_id="run", attempt=1) -> Envelope:
    return Envelope(
        key=RoundKey(
            run_id=run_id, attempt=attempt, round_number=round_number, model_hash=parameters_sha256(weights)
        )
    )


def training_request(plan=None, weights=None, *, ttl=3600.0, **key) -> Message:
    plan = plan or make_plan()
    weights = weights_of(plan) if weights is None else weights
    content = {
        messages.ENVELOPE: envelope_of(weights, **key).to_record(),
        messages.ARRAYS: to_record(weights),
        messages.REQUEST: messages.plan_to_record(plan),
    }
    return Message(RecordDict(content), 7, messages.TRAIN, ttl=ttl)


def ask(toml: Path, request: Message) -> RecordDict:
    """What the hospital's ClientApp answers; Flower's errors would be a defect."""
    return ask_as({"hospital-config": str(toml)}, request)


def ask_as(node_config, request: Message, **run_config) -> RecordDict:
    context = Context(run_id=1, node_id=7, node_config=node_config, state=RecordDict(), run_config=run_config)
    reply = app(request, context)
    assert not reply.has_error()
    return reply.content


def everything_in(content: RecordDict) -> dict:
    """All that an answer holds, arrays as their encoded bytes.

    Not the ledger's receipt: only this hospital can read it, and it is encrypted anew each time.
    """
    return {
        name: {key: getattr(value, "data", value) for key, value in record.items()}
        for name, record in content.items()
        if name != messages.LEDGER_RECEIPT
    }


def charges(toml: Path):
    return Ledger.examine(toml.parent / "ledger", create=True).charges()


def ask_and_die(connection, toml: str, point: str) -> None:
    """In a process of its own: answer a training request, killed by SIGKILL at this step of the round."""
    os.environ[VARIABLE] = point
    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
    connection.send_bytes(b"asked")
    ask(Path(toml), training_request())
    connection.send_bytes(b"answered")
