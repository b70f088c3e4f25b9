"""Whatever a hospital sends: it is dropped and recorded, and the rest is aggregated bit for bit."""

import json
from pathlib import Path

import numpy as np
import pytest

from common import messages
from common.errors import RefusalCode
from common.messages import Envelope
from common.parameters import to_record
from tests.server.fake_federation import (
    FakeGrid,
    NumpyHospital,
    assert_same_bits,
    error_reply,
    fedavg_by_hand,
    in_round,
    make_config,
    model_of,
    outcomes,
    refuse,
    result_of,
    run,
    silent,
    some_parameters,
    three_hospitals,
)

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder(tmp_path):
    return tmp_path / "run"


def with_arrays(arrays):
    def change(reply, request):
        reply.content[messages.ARRAYS] = to_record(arrays)
        return reply

    return change


def with_file(change_bytes, stype="safetensors"):
    """The update's safetensors file, spoilt."""

    def change(reply, request):
        array = reply.content[messages.ARRAYS]["parameters"]
        array.data, array.stype = change_bytes(array.data), stype
        return reply

    return change


def header_of(content):
    length = int.from_bytes(content[:8], "little")
    return json.loads(content[8 : 8 + length]), content[8 + length :]


def with_entry(body=None, **changes):
    """The entry of `weight` in the header says something else."""

    def change_bytes(content):
        header, values = header_of(content)
        header["weight"] |= changes
        text = json.dumps(header).encode()
        return len(text).to_bytes(8, "little") + text + (values if body is None else body)

    return with_file(change_bytes)


def with_metric(**changes):
    def change(reply, request):
        record = reply.content[messages.METRICS]
        for name, value in changes.items():
            record[name.replace("_", "-")] = value
        return reply

    return change


def with_key(**changes):
    def change(reply, request):
        for name, value in changes.items():
            reply.content[messages.ENVELOPE][name.replace("_", "-")] = value
        return reply

    return change


def from_another_sender(reply, request):
    reply.metadata.__dict__["_src_node_id"] = 99
    return reply


def with_extra_record(reply, request):
    reply.content["more"] = to_record(some_parameters(1))
    return reply


def without_arrays(reply, request):
    del reply.content[messages.ARRAYS]
    return reply


def npz_bytes():
    import io

    stream = io.BytesIO()
    np.savez(stream, weight=np.zeros((4, 3), np.float32))
    return stream.getvalue()


def poisoned(value):
    arrays = some_parameters(5)
    arrays["weight"][2, 1] = value
    return with_arrays(arrays)


BAD_REPLIES = {
    "other round": (with_key(round=1), "invalid", "round-key"),
    "other weights": (with_key(model_hash="0" * 64), "invalid", "round-key"),
    "other run": (with_key(run_id="elsewhere"), "invalid", "round-key"),
    "other attempt": (with_key(attempt=2), "invalid", "round-key"),
    "masked": (with_key(masked=True), "invalid", "envelope"),
    "other schema": (with_key(schema_version=1), "invalid", "envelope"),
    "round is text": (with_key(round="2"), "invalid", "envelope"),
    "unknown sender": (from_another_sender, "invalid", "sender"),
    "missing name": (with_arrays({"weight": np.zeros((4, 3), np.float32)}), "invalid", "arrays"),
    "extra name": (with_arrays(some_parameters(5) | {"x": np.zeros(1, np.float32)}), "invalid", "arrays"),
    "broadcastable shape": (
        with_arrays(some_parameters(5) | {"bias": np.zeros(1, np.float32)}),
        "invalid",
        "arrays",
    ),
    "transposed shape": (
        with_arrays(some_parameters(5) | {"weight": np.zeros((3, 4), np.float32)}),
        "invalid",
        "arrays",
    ),
    "float64 in half the shape": (with_entry(dtype="F64"), "invalid", "arrays"),
    "float16": (with_entry(dtype="F16"), "invalid", "arrays"),
    "unknown dtype": (with_entry(dtype="object"), "invalid", "arrays"),
    "hidden metadata": (with_entry(more="secret"), "invalid", "arrays"),
    "npz": (with_file(lambda _: npz_bytes()), "invalid", "arrays"),
    "header of 2**40 elements": (with_entry(shape=[2**20, 2**20]), "invalid", "arrays"),
    "header longer than its array": (
        with_file(lambda c: (2**40).to_bytes(8, "little") + c[8:]),
        "invalid",
        "arrays",
    ),
    "values cut": (with_file(lambda c: c[:-1]), "invalid", "arrays"),
    "no bytes": (with_file(lambda _: b""), "invalid", "arrays"),
    "other encoding": (with_file(lambda c: c, stype="pickle"), "invalid", "arrays"),
    "nan": (poisoned(np.nan), "invalid", "arrays"),
    "inf": (poisoned(-np.inf), "invalid", "arrays"),
    "norm": (with_arrays(some_parameters(5, scale=1e4)), "invalid", "update-norm"),
    "huge": (poisoned(3e38), "invalid", "update-norm"),
    "extra metric": (with_metric(label_count=3), "invalid", "metrics"),
    "list as metric": (with_metric(epsilon=[1.0, 2.0]), "invalid", "metrics"),
    "nan metric": (with_metric(epsilon=float("nan")), "invalid", "metrics"),
    "negative epsilon": (with_metric(epsilon=-1.0), "invalid", "metrics"),
    "wrong count": (with_metric(num_examples=100_000), "invalid", "num-examples"),
    "zero count": (with_metric(num_examples=0), "invalid", "num-examples"),
    "too many steps": (with_metric(steps=3), "invalid", "steps"),
    "no noise": (with_metric(noise_multiplier=0.0), "invalid", "noise-multiplier"),
    "extra record": (with_extra_record, "invalid", "records"),
    "no arrays": (without_arrays, "invalid", "records"),
    "error reply": (error_reply, "failed", "flower-2"),
    "refusal": (refuse(RefusalCode.POLICY), "refused", "policy"),
    "silence": (silent, "late", None),
}


@pytest.mark.parametrize("kind", BAD_REPLIES)
def test_a_bad_reply_is_dropped_and_the_rest_is_aggregated_bit_for_bit(folder, kind):
    change, outcome, code = BAD_REPLIES[kind]
    hospitals = three_hospitals(b=in_round(2, change))
    deadline_s = 0.15 if kind == "silence" else 5.0
    run(make_config(folder, server={"deadline-s": deadline_s}), FakeGrid(hospitals))
    assert outcomes(folder, 2) == {"a": ("aggregated", None), "b": (outcome, code), "c": ("aggregated", None)}
    assert outcomes(folder, 3)["b"] == ("aggregated", None)
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3, without={2: {"b"}}))
    assert [h["rounds"] for h in result_of(folder)["hospitals"]] == [3, 2, 3]
    everything = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"DOE_JOHN" not in everything


def test_a_second_reply_to_the_same_message_is_ignored(folder):
    def twice(reply, request):
        second = messages.answer(request, Envelope.from_record(request.content))
        return [reply, second]

    hospitals = three_hospitals(c=in_round(1, twice))
    run(make_config(folder), FakeGrid(hospitals, arrival=lambda ready: ready[:1]))
    assert outcomes(folder, 1)["c"] == ("aggregated", None)
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3))


def test_a_reply_that_comes_in_the_next_round_is_not_counted_there(folder):
    kept = []

    def too_late(reply, request):
        kept.append(reply)

    def old_and_new(reply, request):
        return [kept[0], reply]

    def tamper(reply, request):
        return in_round(2, old_and_new)(in_round(1, too_late)(reply, request), request)

    hospitals = three_hospitals(a=tamper)
    run(make_config(folder, server={"deadline-s": 0.15}), FakeGrid(hospitals))
    assert outcomes(folder, 1)["a"] == ("late", None)
    assert outcomes(folder, 2)["a"] == ("aggregated", None)
    assert_same_bits(model_of(folder), fedavg_by_hand(hospitals.values(), 3, without={1: {"a"}}))


def test_a_hospital_that_lies_about_its_count_later_is_left_out(folder):
    hospitals = three_hospitals()
    run(make_config(folder, federation={"rounds": 3}), FakeGrid(hospitals))
    (folder / "checkpoints" / "3" / "manifest.json").unlink()
    changed = three_hospitals()
    changed[7] = NumpyHospital("c", 30_000)
    run(make_config(folder), FakeGrid(changed))
    assert set(outcomes(folder, 3)) == {"a", "b"}
