import hashlib
import json
import math
import struct
import tracemalloc

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from common.errors import WireError
from common.parameters import (
    difference,
    from_record,
    into_record,
    l2_norm,
    parameters_sha256,
    read_safetensors,
    record_bytes,
    template_of,
    to_record,
    write_safetensors,
)

finite_arrays = hnp.arrays(
    np.float32,
    hnp.array_shapes(min_dims=0, max_dims=4, max_side=4),
    elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
)
models = st.dictionaries(st.text("abc.", min_size=1, max_size=6), finite_arrays, min_size=1, max_size=4)


def bits(parameters):
    return {name: (array.shape, array.tobytes()) for name, array in parameters.items()}


@settings(max_examples=60, deadline=None)
@given(models)
def test_what_is_sent_arrives_bit_for_bit(parameters):
    assert bits(from_record(to_record(parameters), template_of(parameters))) == bits(parameters)


def test_arrays_in_other_layouts_arrive_too():
    strided = np.arange(24, dtype=np.float32).reshape(4, 6)[::2, ::3]
    parameters = {
        "t": strided.T,
        "big-endian": np.arange(3, dtype=">f4"),
        "scalar": np.float32(2).reshape(()),
    }
    received = from_record(to_record(parameters), template_of(parameters))
    for name, array in parameters.items():
        assert received[name].tolist() == array.tolist()


@settings(max_examples=40, deadline=None)
@given(models)
def test_files_keep_every_bit_and_the_order_asked_for(tmp_path_factory, parameters):
    path = tmp_path_factory.mktemp("model") / "model.safetensors"
    write_safetensors(path, parameters)
    assert bits(read_safetensors(path)) == bits(parameters)
    assert list(read_safetensors(path)) == sorted(parameters)
    backwards = dict(reversed(template_of(parameters).items()))
    assert list(read_safetensors(path, backwards)) == list(backwards)


def test_the_hash_is_defined_by_names_shapes_and_values():
    digest = hashlib.sha256()
    digest.update(b"a:(2,)\n" + struct.pack("<2f", 1.0, -2.0))
    digest.update(b"b:()\n" + struct.pack("<f", 0.5))
    parameters = {"b": np.array(0.5, np.float32), "a": np.array([1, -2], np.float32)}
    assert parameters_sha256(parameters) == digest.hexdigest()
    assert parameters_sha256(dict(reversed(parameters.items()))) == digest.hexdigest()
    assert parameters_sha256(parameters | {"a": np.array([[1, -2]], np.float32)}) != digest.hexdigest()


def test_the_norm_is_that_of_all_arrays_and_tells_infinity_from_nan():
    parameters = {"a": np.array([3.0], np.float32), "b": np.array([[0.0, -4.0]], np.float32)}
    assert l2_norm(parameters) == 5.0
    assert l2_norm({"a": np.full(4, 3e38, np.float32)}) == pytest.approx(6e38, rel=1e-6)
    assert l2_norm({"a": np.array([np.inf], np.float32)}) == math.inf
    assert math.isnan(l2_norm({"a": np.array([np.nan], np.float32)}))
    assert l2_norm({}) == 0.0


def test_the_difference_and_its_sum_agree():
    first, second = {"a": np.array([1.5, 2], np.float32)}, {"a": np.array([1, 4], np.float32)}
    assert difference(first, second)["a"].tolist() == [0.5, -2.0]


def entry(dtype="F32", shape=(2, 3), offsets=(0, 24), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets)} | more


def file(header, body=bytes(24), *, length=None) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def record_of(content: bytes, stype="safetensors", name="parameters") -> ArrayRecord:
    return ArrayRecord({name: Array("uint8", (len(content),), stype, content)})


VALUES = struct.pack("<6f", *range(6))
GOOD = file({"w": entry()}, VALUES)
BAD_BYTES = {
    "empty": b"",
    "prefix only": struct.pack("<Q", 0),
    "zip": b"PK\x03\x04" + bytes(40),
    "npy": b"\x93NUMPY\x01\x00" + bytes(100),
    "no json": file(b"not json"),
    "a list": file(b"[]"),
    "a number": file(b"7"),
    "nested": file(b"[" * 290),
    "bytes that are no text": file(b"\xff\xfe"),
    "header longer than the file": file({"w": entry()}, length=2**40),
    "header cut": file({"w": entry()}, length=10),
    "shape": file({"w": entry(shape=(3, 2))}),
    "negative shape": file({"w": entry(shape=(-2, -3))}),
    "flat shape": file({"w": entry(shape=(6,))}),
    "huge shape": file({"w": entry(shape=(2**40, 3))}),
    "bool shape": file({"w": entry(shape=(2, True))}),
    "float shape": file({"w": entry(shape=(2, 3.0))}),
    "shape is a word": file({"w": entry() | {"shape": "2, 3"}}),
    "float64": file({"w": entry("F64", offsets=(0, 48))}, bytes(48)),
    "float16": file({"w": entry("F16")}),
    "an unknown type": file({"w": entry("object")}),
    "a hidden key": file({"w": entry(more=1)}),
    "an entry that is none": file({"w": 3}),
    "offsets missing": file({"w": {"dtype": "F32", "shape": [2, 3], "x": 0}}),
    "offsets beyond the end": file({"w": entry(offsets=(4, 28))}),
    "negative offsets": file({"w": entry(offsets=(-24, 0))}),
    "offsets too far apart": file({"w": entry(offsets=(0, 28))}, bytes(28)),
    "bool offsets": file({"w": entry(offsets=(False, 24))}),
    "one byte short": file({"w": entry()}, bytes(23)),
    "one byte more": file({"w": entry()}, bytes(25)),
    "much more": file({"w": entry()}, bytes(10_000)),
    "metadata": file({"w": entry(), "__metadata__": {"a": "b"}}),
    "nan": file({"w": entry()}, struct.pack("<6f", 0, 0, math.nan, 0, 0, 0)),
    "inf": file({"w": entry()}, struct.pack("<6f", 0, 0, 0, 0, 0, -math.inf)),
}


@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bad_bytes_are_refused(kind):
    with pytest.raises(WireError, match="parameter"):
        from_record(record_of(BAD_BYTES[kind]), {"w": (2, 3)})


@pytest.mark.parametrize(
    "record",
    [
        ArrayRecord(),
        record_of(GOOD, stype="numpy.ndarray"),
        record_of(GOOD, stype="pickle"),
        record_of(GOOD, name="w"),
        ArrayRecord({"parameters": Array("u", (1,), "safetensors", GOOD), "more": Array(np.zeros(1))}),
    ],
)
def test_anything_but_the_one_entry_is_refused(record):
    with pytest.raises(WireError, match="one safetensors entry"):
        from_record(record, {"w": (2, 3)})


def test_two_parameters_may_not_share_bytes_or_leave_some_out():
    template = {"a": (2,), "b": (2,)}
    whole = {"a": entry(shape=(2,), offsets=(8, 16)), "b": entry(shape=(2,), offsets=(0, 8))}
    assert from_record(record_of(file(whole, VALUES[:16])), template)["a"].tolist() == [2, 3]
    for offsets in ((0, 8), (4, 12), (16, 24)):
        shared = whole | {"a": entry(shape=(2,), offsets=offsets)}
        with pytest.raises(WireError, match="overlap or leave gaps"):
            from_record(record_of(file(shared, VALUES[: max(16, offsets[1])])), template)


def test_the_same_bytes_unspoilt_are_accepted():
    assert from_record(record_of(GOOD), {"w": (2, 3)})["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 200))
def test_damaged_bytes_give_the_model_or_a_refusal(noise, start, length):
    content = GOOD[:start] + noise + GOOD[start + length :]
    try:
        received = from_record(record_of(content), {"w": (2, 3)})["w"]
    except WireError:
        return
    assert received.shape == (2, 3)
    assert np.isfinite(received).all()


def test_it_is_what_the_safetensors_library_reads_and_writes():
    from safetensors.numpy import load, save

    parameters = {"b": np.arange(3, dtype=np.float32), "a": np.array(2, np.float32)}
    assert bits(load(to_record(parameters)["parameters"].data)) == bits(parameters)
    assert bits(from_record(record_of(save(parameters)), template_of(parameters))) == bits(parameters)


def test_nothing_large_is_allocated_for_a_header_that_promises_much():
    promised = file({"w": entry(shape=(2**20, 2**20), offsets=(0, 2**42))})
    tracemalloc.start()
    with pytest.raises(WireError):
        from_record(record_of(promised), {"w": (2, 3)})
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20


def test_other_names_are_refused_and_counted():
    with pytest.raises(WireError) as caught:
        from_record(
            to_record({"a": np.zeros(1, np.float32), "x": np.zeros(1, np.float32)}), {"a": (1,), "b": (1,)}
        )
    assert "1 missing, 1 unknown" in caught.value.why


def test_size_is_that_of_the_encoded_arrays():
    record = to_record({"a": np.zeros(100, np.float32)})
    assert record_bytes(record) == len(record["parameters"].data)
    assert 400 < record_bytes(record) < 400 + 128


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", b"\xff" * 64])
def test_a_file_that_is_no_safetensors_is_refused(tmp_path, content):
    (tmp_path / "x").write_bytes(content)
    with pytest.raises(WireError):
        read_safetensors(tmp_path / "x")


@pytest.mark.parametrize("array", [np.zeros(2, np.float64), np.array([np.nan, 0], np.float32)])
@pytest.mark.parametrize("template", [None, {"w": (2,)}])
def test_a_file_holds_finite_float32_or_is_refused(tmp_path, array, template):
    from safetensors.numpy import save_file

    save_file({"w": array}, tmp_path / "x")
    with pytest.raises(WireError, match="finite float32"):
        read_safetensors(tmp_path / "x", template)


def test_a_file_of_another_model_is_refused(tmp_path):
    write_safetensors(tmp_path / "x", {"w": np.zeros(2, np.float32)})
    for template in ({"w": (3,)}, {"v": (2,)}, {"w": (2,), "v": (2,)}):
        with pytest.raises(WireError, match="another model"):
            read_safetensors(tmp_path / "x", template)


def test_files_and_records_are_byte_for_byte_those_of_the_library(tmp_path):
    from safetensors.numpy import save

    random = np.random.default_rng(0)
    shapes = {"b.w": (3, 4), "a": (), "empty": (0, 3), "\u00e9": (5,), "large": (40_000,)}
    parameters = {name: np.asarray(random.normal(size=shape), np.float32) for name, shape in shapes.items()}
    for some in (parameters, {}, {"levels": np.arange(5, dtype=np.int8), "w": np.ones(2, np.float32)}):
        assert to_record(some)["parameters"].data == save(some)
    write_safetensors(tmp_path / "x", parameters, mode=0o600)
    assert (tmp_path / "x").read_bytes() == save(parameters)
    assert (tmp_path / "x").stat().st_mode & 0o777 == 0o600
    assert list(tmp_path.iterdir()) == [tmp_path / "x"]


def test_a_model_and_its_message_are_in_memory_once():
    parameters = {"b": np.arange(6, dtype=np.float32).reshape(2, 3), "a": np.full((), 7, np.float32)}
    before = {name: array.copy() for name, array in parameters.items()}
    record = into_record(parameters)
    assert list(parameters) == ["b", "a"]
    assert record["parameters"].data == to_record(before)["parameters"].data
    memory = np.frombuffer(record["parameters"].data, dtype=np.uint8)
    for name, array in parameters.items():
        np.testing.assert_array_equal(array, before[name])
        assert np.shares_memory(array, memory)


def test_writing_a_large_file_needs_no_copy(tmp_path):
    parameters = {"w": np.zeros(2_000_000, np.float32)}
    tracemalloc.start()
    write_safetensors(tmp_path / "x", parameters)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000
