import hashlib
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


def header(text: bytes, *, version=b"\x01\x00") -> bytes:
    return b"\x93NUMPY" + version + struct.pack("<H", len(text)) + text


GOOD = b"{'descr': '<f4', 'fortran_order': False, 'shape': (2, 3), }\n"
BAD_BYTES = {
    "empty": b"",
    "zip": b"PK\x03\x04" + bytes(40),
    "version 2": b"\x93NUMPY\x02\x00" + struct.pack("<I", len(GOOD)) + GOOD + bytes(24),
    "shape": header(GOOD.replace(b"(2, 3)", b"(3, 2)")) + bytes(24),
    "negative shape": header(GOOD.replace(b"(2, 3)", b"(-2, -3)")) + bytes(24),
    "flat shape": header(GOOD.replace(b"(2, 3)", b"(6,)")) + bytes(24),
    "huge shape": header(GOOD.replace(b"(2, 3)", b"(1099511627776, 3)")) + bytes(24),
    "bool shape": header(GOOD.replace(b"(2, 3)", b"(2, True)")) + bytes(24),
    "float64": header(GOOD.replace(b"<f4", b"<f8")) + bytes(48),
    "big-endian": header(GOOD.replace(b"<f4", b">f4")) + bytes(24),
    "object": header(GOOD.replace(b"<f4", b"|O")) + bytes(24),
    "structured": header(GOOD.replace(b"'<f4'", b"[('a', '<f4')]")) + bytes(24),
    "fortran": header(GOOD.replace(b"False", b"True")) + bytes(24),
    "one byte short": header(GOOD) + bytes(23),
    "one byte more": header(GOOD) + bytes(25),
    "header cut": header(GOOD)[:-20],
    "nested header": header(b"(" * 3000) + bytes(24),
    "header is code": header(b"__import__('os').system('true')") + bytes(24),
    "unhashable key": header(b"{[]: 1}") + bytes(24),
    "header is a number": header(b"7") + bytes(24),
    "nan": header(GOOD) + struct.pack("<6f", 0, 0, math.nan, 0, 0, 0),
    "inf": header(GOOD) + struct.pack("<6f", 0, 0, 0, 0, 0, -math.inf),
}


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@pytest.mark.parametrize("kind", BAD_BYTES)
def test_bad_bytes_are_refused(kind):
    record = ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", BAD_BYTES[kind])})
    with pytest.raises(WireError, match="parameter w"):
        from_record(record, {"w": (2, 3)})


def test_the_same_bytes_unspoilt_are_accepted():
    content = header(GOOD) + struct.pack("<6f", *range(6))
    record = ArrayRecord({"w": Array("float64", (99,), "numpy.ndarray", content)})  # only the bytes count
    assert from_record(record, {"w": (2, 3)})["w"].tolist() == [[0, 1, 2], [3, 4, 5]]


@pytest.mark.filterwarnings("ignore:Reading `.npy`")
@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200), st.integers(0, 120), st.integers(0, 200))
def test_damaged_bytes_give_the_model_or_a_refusal(noise, start, length):
    good = header(GOOD) + struct.pack("<6f", *range(6))
    content = good[:start] + noise + good[start + length :]
    record = ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", content)})
    try:
        received = from_record(record, {"w": (2, 3)})["w"]
    except WireError:
        return
    assert received.shape == (2, 3)
    assert np.isfinite(received).all()


def test_nothing_large_is_allocated_for_a_header_that_promises_much():
    promised = header(GOOD.replace(b"(2, 3)", b"(1048576, 1048576)")) + bytes(24)
    record = ArrayRecord({"w": Array("float32", (2, 3), "numpy.ndarray", promised)})
    tracemalloc.start()
    with pytest.raises(WireError):
        from_record(record, {"w": (2, 3)})
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
    assert record_bytes(record) == len(record["a"].data) == 128 + 400


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
