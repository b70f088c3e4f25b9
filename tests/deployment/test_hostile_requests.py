"""A server that asks for what it may not have: a hospital in operation refuses by name and charges nothing.

The messages go over TLS through Flower to a real SuperNode and a real worker. A bundle with one changed byte
is in tests/client/deployment/test_operation.py.
"""

import json
import struct
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message

from common import messages
from common.errors import RefusalCode
from common.parameters import to_record
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import (
    Federation,
    RunningHospital,
    answer_to,
    ask,
    send,
    wait_for,
)
from tests.client.small_hospital import charges, make_plan, training_request, weights_of

pytestmark = [pytest.mark.faults, pytest.mark.timeout(180)]
SIGMA, EPSILON = 2.0, 50.0


@pytest.fixture(scope="module")
def operation(tmp_path_factory):
    """A server and a hospital whose policy is fixed noise and private training only."""
    folder = tmp_path_factory.mktemp("hostile")
    with Federation(folder / "server", Authority()) as server:
        north = RunningHospital(
            folder / "north", server.authority, server.port, noise_multiplier=SIGMA, epsilon=EPSILON
        )
        node = wait_for(lambda: server.register(north.public, "north"), within_s=30)
        north.start()
        try:
            north.await_ready()
            yield north, node, server.start_run()
        finally:
            north.end()


def planned(**sections):
    return lambda: training_request(make_plan(**sections), weights_of(make_plan()))


def wished(name, value):
    """A plan with a key that no plan has."""

    def make():
        request = training_request()
        request.content[messages.REQUEST][name] = value
        return request

    return make


def of_another_model():
    """Weights of a network that the plan does not name, honestly hashed."""
    other = make_plan(model={"name": "cnn-small"}, data={"image-size": 28})
    return training_request(make_plan(), weights_of(other))


def with_one_more_layer():
    weights = dict(weights_of(make_plan())) | {"hidden.weight": np.zeros((4, 4), np.float32)}
    return training_request(make_plan(), weights)


def of_schema_99():
    request = training_request()
    request.content[messages.ENVELOPE]["schema-version"] = 99
    return request


def with_header_of_a_terabyte():
    """A safetensors file of 100 bytes whose header promises 2**38 numbers."""
    entry = {"dtype": "F32", "shape": [2**38], "data_offsets": [0, 2**40]}
    header = json.dumps({"output.bias": entry}).encode()
    return with_bytes(struct.pack("<Q", len(header)) + header)


def with_huge_header():
    """A header of 8 MB."""
    header = json.dumps({"output.bias": "x" * 2**23}).encode()
    return with_bytes(struct.pack("<Q", len(header)) + header)


def with_bytes(content, stype="safetensors"):
    request = training_request()
    array = Array("uint8", (len(content),), stype, content)
    request.content[messages.ARRAYS] = ArrayRecord({"parameters": array})
    return request


def with_values(value):
    def make():
        weights = weights_of(make_plan())
        weights["output.bias"][0] = value
        return training_request(weights=weights)

    return make


def in_float64():
    weights = weights_of(make_plan())
    honest = to_record(weights)["parameters"].data
    return with_bytes(honest.replace(b'"F32"', b'"F64"'))


ASKED = {
    "no privacy": (planned(federation={"private": False}), RefusalCode.NOT_PRIVATE),
    "noise that can be foretold": (planned(federation={"reproducible": True}), RefusalCode.NOT_PRIVATE),
    "sigma 0": (wished("privacy.noise-multiplier", 0.0), RefusalCode.WEIGHTS),
    "epsilon 1000": (wished("privacy.epsilon", 1000.0), RefusalCode.WEIGHTS),
    "epsilon 1000 as policy": (wished("policy.epsilon", 1000.0), RefusalCode.WEIGHTS),
    "other images": (wished("data.path", "/etc"), RefusalCode.WEIGHTS),
    "clip of a million": (planned(privacy={"l2-clip-norm": 1e6}), RefusalCode.POLICY),
    "rounds without end": (planned(federation={"rounds": 100_000}), RefusalCode.POLICY),
    "steps without end": (planned(privacy={"local-steps": 10_000}), RefusalCode.POLICY),
    "images of 2048": (planned(data={"image-size": 2048}), RefusalCode.POLICY),
    "more noise than trains": (planned(privacy={"minimum-noise-multiplier": 1e6}), RefusalCode.POLICY),
    "another architecture": (of_another_model, RefusalCode.WEIGHTS),
    "a network of no registry": (planned(model={"name": "their-own"}), RefusalCode.MODEL),
    "one more layer": (with_one_more_layer, RefusalCode.WEIGHTS),
    "schema 99": (of_schema_99, RefusalCode.SCHEMA),
    "header of a terabyte": (with_header_of_a_terabyte, RefusalCode.WEIGHTS),
    "huge header": (with_huge_header, RefusalCode.WEIGHTS),
    "pickle": (lambda: with_bytes(b"\x80\x04.", stype="numpy.ndarray"), RefusalCode.WEIGHTS),
    "nan": (with_values(np.nan), RefusalCode.WEIGHTS),
    "inf": (with_values(np.inf), RefusalCode.WEIGHTS),
    "float64": (in_float64, RefusalCode.WEIGHTS),
}


@dataclass(frozen=True)
class Heard:
    """What became of all of them, asked one after the other without a pause."""

    replies: dict[str, Message]
    audited: list[str]
    charges: tuple
    grown_mb: float


@pytest.fixture(scope="module")
def heard(operation):
    north, node, grid = operation
    before, memory = len(north.audit()), resident_mb(north)
    sent = {what: send(grid, node, make()) for what, (make, _) in ASKED.items()}
    replies = {what: answer_to(grid, message_id) for what, message_id in sent.items()}
    audited = [line["what"] for line in north.audit()[before:]]
    return Heard(replies, audited, charges(north.toml), resident_mb(north) - memory)


@pytest.mark.parametrize("what", ASKED)
def test_what_a_hostile_server_asks_is_refused_by_name(heard, what):
    reply = heard.replies[what]
    assert not reply.has_error()
    assert messages.refusal_code(reply.content) is ASKED[what][1]
    assert set(reply.content) == {messages.ENVELOPE, messages.REFUSAL}, "nothing but the code leaves"


def test_none_of_it_was_charged_and_each_is_a_line_in_the_audit_log(heard):
    assert heard.charges == ()
    expected = Counter(f"refusal {code.value}" for _, code in ASKED.values())
    assert Counter(heard.audited) == expected
    assert heard.grown_mb < 100, "a header promises memory and gets none"


def test_afterwards_an_honest_request_is_trained_under_the_hospitals_own_policy(operation, heard):
    """Last in this file. A plan that asks for no noise of its own gets the hospital's."""
    north, node, grid = operation
    wait_for(lambda: north.status()["last_refusal"], within_s=5)
    reply = ask(grid, node, training_request(make_plan(privacy={"minimum-noise-multiplier": 0.0})))
    assert reply.content[messages.METRICS][messages.NOISE_MULTIPLIER] == SIGMA
    (charge,) = charges(north.toml)
    assert charge.event.noise_multiplier == SIGMA
    assert north.status()["epsilon_limit"] == EPSILON


def resident_mb(north):
    (line,) = [
        line
        for line in Path(f"/proc/{north.processes()['worker']}/status").read_text().splitlines()
        if line.startswith("VmRSS")
    ]
    return int(line.split()[1]) / 1024
