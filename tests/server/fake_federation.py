"""Hospitals made of numpy and a grid made of a list, to run the real ServerApp in milliseconds."""

import json
import os
import uuid
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity
from safetensors.numpy import load

from common import messages
from common.config import FederationConfig
from common.messages import SCHEMA_VERSION, Envelope
from common.parameters import parameters_sha256, read_safetensors, to_record, write_safetensors
from common.settings import parse, to_flat
from server.app import main

TEMPLATE = {"bias": (3,), "weight": (4, 3)}
HISTOGRAMS = [
    0.0,
    1.0,
    1.0,
    2.0,
    1.0,
    5.0,
    10.0,
    10.0,
    10.0,
    10.0,
    *reversed([0.0, 1.0, 1.0, 3.0, 5.0, 10.0, 5.0, 5.0, 10.0, 10.0]),
]
"""50 patients with the finding, 50 without, by the probability of the finding."""
CONFIG = {
    "federation": {"rounds": 3},
    "privacy": {"local-steps": 2},
    "server": {"patience-s": 0.2, "deadline-s": 5.0, "quorum": 2},
    "runtime": {"expected-hospitals": 3},
}


def make_config(folder: Path, **sections) -> FederationConfig:
    values = {name: {**content, **sections.pop(name, {})} for name, content in CONFIG.items()} | sections
    initial = folder.parent / "initial.safetensors"
    if not initial.exists():
        write_safetensors(initial, some_parameters(0))
    values["runtime"] |= {"run-folder": str(folder), "initial-weights": str(initial)}
    return parse(FederationConfig, values, source="test")


def some_parameters(*seed: int, scale: float = 0.1) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: scale * random.standard_normal(shape, dtype=np.float32) for name, shape in TEMPLATE.items()}


class HeldVector:
    """A flat update in memory, read as those on disk are."""

    def __init__(self, array) -> None:
        self.array = array

    def __len__(self) -> int:
        return len(self.array)

    def read(self, start, out) -> None:
        out[:] = self.array[start : start + len(out)]


def arrays_in(content) -> dict[str, np.ndarray]:
    """The arrays of a message, read by the safetensors library."""
    (array,) = content[messages.ARRAYS].values()
    return load(array.data)


class FakeGrid:
    """A hospital is a function from a message to a reply, several replies or None for silence."""

    def __init__(self, hospitals: dict[int, Callable], arrival: Callable = lambda replies: replies) -> None:
        self.hospitals, self.arrival = hospitals, arrival
        self.waiting: list[Message] = []
        self.sent: list[Message] = []
        TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1

    def get_node_ids(self):
        return list(self.hospitals)

    def push_messages(self, outgoing):
        for message in outgoing:
            message.metadata.__dict__["_message_id"] = str(uuid.uuid4())
            self.sent.append(message)
            replies = self.hospitals[message.metadata.dst_node_id](message) or []
            self.waiting += replies if isinstance(replies, list) else [replies]
        return [message.metadata.message_id for message in outgoing]

    def pull_messages(self, message_ids):
        ready = [m for m in self.waiting if m.metadata.reply_to_message_id in message_ids]
        chosen = self.arrival(ready)
        self.waiting = [m for m in self.waiting if m not in chosen]
        return chosen


class NumpyHospital:
    """Answers every exchange; its update depends on its name, the round and the weights it got."""

    def __init__(
        self, name: str, enrolled: int = 100, tamper: Callable = lambda reply, request: reply
    ) -> None:
        self.name, self.enrolled, self.tamper = name, enrolled, tamper
        self.asked: list[Envelope] = []
        self.scored: list[Envelope] = []
        self.counts = {"confusion": [40.0, 10.0, 5.0, 45.0], "scores": HISTOGRAMS}
        self.model: dict[str, bytes] | None = None

    def __call__(self, request: Message):
        envelope = Envelope.from_record(request.content)
        kind = request.metadata.message_type
        if kind == messages.HELLO:
            reply = messages.answer(request, envelope, hospital=ConfigRecord(self.introduction()))
        elif kind == messages.CLOSING:
            arrays = request.content[messages.ARRAYS]
            self.model = {name: array.data for name, array in arrays.items()}
            stored = parameters_sha256(arrays_in(request.content))
            reply = messages.answer(request, envelope, receipt=ConfigRecord({"sha256": stored}))
        elif kind == messages.EVALUATE:
            self.scored.append(envelope)
            reply = messages.answer(
                request,
                envelope,
                counts=MetricRecord(dict(self.counts)),
                metrics=MetricRecord(self.costs(request)),
            )
        else:
            self.asked.append(envelope)
            weights = arrays_in(request.content)
            reply = messages.answer(
                request,
                envelope,
                arrays=to_record(self.delta(weights, envelope.key.round_number)),
                metrics=MetricRecord(self.metrics(request, envelope.key.round_number)),
            )
        return self.tamper(reply, request)

    def introduction(self) -> dict:
        return {
            "name": self.name,
            "enrolled-patients": self.enrolled,
            "schema-version": SCHEMA_VERSION,
            "version": "0.1.0",
        }

    def delta(self, weights, round_number: int) -> dict[str, np.ndarray]:
        noise = some_parameters(*self.name.encode(), round_number)
        return {name: np.float32(0.1) * noise[name] - np.float32(0.05) * weights[name] for name in weights}

    def costs(self, request: Message) -> dict:
        """What goes with the counts: noise of 0.3 sqrt(2) on each, an epsilon above its cost, 15.2."""
        spent = {"noise-multiplier": 0.3, "epsilon": 16.0 * len(self.scored), "delta": 1e-3}
        claims = messages.plan_from_record(request.content).claims_privacy
        return {"num-examples": self.enrolled} | (spent if claims else {})

    def metrics(self, request: Message, round_number: int) -> dict:
        public = {"num-examples": self.enrolled, "training-started": 1.0, "training-ended": 1.5}
        spent = {"noise-multiplier": 4.0, "steps": 2, "epsilon": 0.5 * round_number, "delta": 1e-3}
        return public | (spent if messages.plan_from_record(request.content).claims_privacy else {})


def three_hospitals(**tampered: Callable) -> dict[int, NumpyHospital]:
    """Hospitals a, b, c with 100, 200, 300 enrolled, behind node ids in another order than their names."""
    unchanged = lambda reply, request: reply  # noqa: E731
    return {
        node_id: NumpyHospital(name, enrolled, tampered.get(name, unchanged))
        for node_id, name, enrolled in [(7, "c", 300), (8, "a", 100), (9, "b", 200)]
    }


def in_round(number: int, change: Callable) -> Callable:
    """Tamper with the training answer of one round only."""

    def tamper(reply: Message, request: Message):
        is_training = request.metadata.message_type == messages.TRAIN
        key = Envelope.from_record(request.content).key
        return change(reply, request) if is_training and key.round_number == number else reply

    return tamper


def run(config: FederationConfig, grid: FakeGrid) -> None:
    """Run the real ServerApp's main function to its end."""
    flat = dict(to_flat(config))
    context = Context(run_id=1, node_id=1, node_config={}, state=RecordDict(), run_config=flat)
    with mock.patch.object(os, "fsync"):  # no test here cuts the power
        main(grid, context)


def fedavg_by_hand(
    hospitals, rounds: int, *, without: dict[int, set[str]] | None = None, weight: Callable = lambda n: n
) -> dict[str, np.ndarray]:
    """FedAvg the slow way: each number summed on its own in float64, hospitals by name."""
    weights = some_parameters(0)
    for number in range(1, rounds + 1):
        skipped = (without or {}).get(number, set())
        chosen = sorted((h for h in hospitals if h.name not in skipped), key=lambda h: h.name)
        deltas = [hospital.delta(weights, number) for hospital in chosen]
        total = sum(weight(hospital.enrolled) for hospital in chosen)
        moved = {}
        for name, array in weights.items():
            flat = []
            for position, old in enumerate(array.ravel()):
                mean = 0.0
                for hospital, delta in zip(chosen, deltas, strict=True):
                    mean += weight(hospital.enrolled) * float(delta[name].ravel()[position])
                flat.append(np.float32(float(old) + float(np.float32(mean / total))))
            moved[name] = np.array(flat, dtype=np.float32).reshape(array.shape)
        weights = moved
    return weights


def result_of(folder):
    return json.loads((folder / "result.json").read_text())


def model_of(folder):
    return read_safetensors(folder / "model.safetensors")


def metrics_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcomes(folder, round_number):
    lines = [line for line in metrics_of(folder) if line["round"] == round_number and "hospital" in line]
    return {line["hospital"]: (line["outcome"], line["code"]) for line in lines}


def assert_same_bits(first, second):
    assert first.keys() == second.keys()
    for name in first:
        assert first[name].tobytes() == second[name].tobytes(), name


def refuse(code):
    return lambda reply, request: messages.refusal(request, Envelope.from_record(request.content), code)


def silent(reply, request):
    return None


def error_reply(reply, request):
    return Message(Error(code=2, reason="FileNotFoundError: /data/DOE_JOHN_1950.dcm"), reply_to=request)
