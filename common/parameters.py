"""Model parameters as named float32 arrays: hashing, files, and careful decoding of what arrives.

Parameters are `dict[str, np.ndarray]` in the model's own order. Whatever comes from another machine is
checked against a template of names and shapes before its bytes are turned into arrays. Updates in whole
numbers (`common.quantisation`) are named arrays of integers and use the same functions.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from common.errors import WireError
from common.files import write_atomically

Parameters = dict[str, npt.NDArray[np.float32]]
Template = Mapping[str, tuple[int, ...]]
"""Names and shapes that parameters must have."""
Layout = Mapping[str, tuple[str, tuple[int, ...]]]
"""By name the type, as safetensors writes it, and the shape that an array must have."""

ENTRY, SAFETENSORS = "parameters", "safetensors"
"""Name and encoding of the one entry in a record of arrays."""
_TYPES = {"F32": "<f4", "I8": "i1", "U8": "u1", "I16": "<i2", "U32": "<u4", "I32": "<i4", "I64": "<i8"}
_PREFIX = 8
_BLOCK = 1 << 16
_HEADER_BASE, _HEADER_ENTRY = 64, 256
"""Bytes that a header may take: for itself, and for each parameter beside its name."""


def template_of(parameters: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `parameters`."""
    return {name: array.shape for name, array in parameters.items()}


def parameters_sha256(parameters: Mapping[str, npt.NDArray[Any]]) -> str:
    """SHA-256 over names, shapes and float32 bytes in name order; equal for equal models on any engine.

    Arrays of integers are hashed as they are, with their type.
    """
    digest = hashlib.sha256()
    for name in sorted(parameters):
        array = _little_endian(parameters[name])
        kind = "" if array.dtype.kind == "f" else f"{array.dtype.str}:"
        digest.update(f"{name}:{kind}{array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _little_endian(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    kind = array.dtype.newbyteorder("<") if array.dtype.kind in "iu" else "<f4"
    return np.asarray(array, dtype=kind, order="C")  # unlike ascontiguousarray it keeps shape ()


def l2_norm(parameters: Mapping[str, npt.NDArray[np.float32]]) -> float:
    """Euclidean norm over all arrays, accumulated in float64; infinite values give inf, NaN gives nan."""
    blocks = (block for array in parameters.values() for block in _blocks(array))
    return math.sqrt(sum(float(np.sum(np.square(block, dtype=np.float64))) for block in blocks))


def _blocks(array: npt.NDArray[np.float32]) -> Iterator[npt.NDArray[np.float32]]:
    """The numbers of an array in pieces that stay in cache."""
    flat = array.reshape(-1)
    return (flat[start : start + _BLOCK] for start in range(0, flat.size, _BLOCK))


def difference(
    minuend: Mapping[str, npt.NDArray[np.float32]], subtrahend: Mapping[str, npt.NDArray[np.float32]]
) -> Parameters:
    """`minuend - subtrahend`, array by array."""
    return {name: minuend[name] - subtrahend[name] for name in minuend}


def to_record(parameters: Mapping[str, npt.NDArray[Any]]) -> ArrayRecord:
    """Encode as Flower's record: one entry, a safetensors file of little-endian float32 (or integers).

    One entry because Flower asks for every entry of a record by requests of its own.
    """
    content = b"".join(_file_parts(parameters))
    return ArrayRecord({ENTRY: Array("uint8", (len(content),), SAFETENSORS, content)})


def into_record(parameters: Parameters) -> ArrayRecord:
    """As `to_record`; the arrays of `parameters` are afterwards views of the record's bytes, read-only.

    So a model and its message are in memory once, for as long as both are needed.
    """
    record = to_record(parameters)
    parameters.update(from_record(record, template_of(parameters)))
    return record


def _file_parts(parameters: Mapping[str, npt.NDArray[Any]]) -> Iterable[bytes | memoryview]:
    """A safetensors file in parts, byte for byte as the library writes it; float32 is not copied."""
    arrays = {name: _little_endian(array) for name, array in parameters.items()}
    if any(array.dtype != "<f4" for array in arrays.values()):
        from safetensors.numpy import save

        return [save(arrays)]
    header, end = {}, 0
    for name in sorted(arrays):
        start, end = end, end + arrays[name].nbytes
        header[name] = {"dtype": "F32", "shape": list(arrays[name].shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % _PREFIX)
    return [len(text).to_bytes(_PREFIX, "little"), text, *(arrays[name].data for name in header)]


def from_record(record: ArrayRecord, template: Template) -> Parameters:
    """Decode what arrived, refusing other names, shapes, dtypes, sizes and non-finite values.

    The header is compared with `template` before anything is made of the values, which are not copied.
    Raises WireError; its text names parameters only.
    """
    content = content_of(record, num_bytes=4 * num_parameters(template), names=template)
    parameters = arrays_in(content, {name: ("F32", shape) for name, shape in template.items()})
    for name, array in parameters.items():
        if not all(np.isfinite(block).all() for block in _blocks(array)):
            raise WireError(f"parameter {name} holds values that are not finite")
    return parameters


def num_parameters(template: Template) -> int:
    """Count of numbers in all parameters."""
    return sum(math.prod(shape) for shape in template.values())


def content_of(record: ArrayRecord, *, num_bytes: int, names: Iterable[str]) -> bytes:
    """The safetensors file in a record, at most `num_bytes` of values under these names. Raises WireError."""
    array = record.get(ENTRY)
    if array is None or len(record) != 1 or array.stype != SAFETENSORS:
        raise WireError(f"the parameters do not arrive as one {SAFETENSORS} entry named {ENTRY!r}")
    content = array.data
    if len(content) > num_bytes + _PREFIX + _HEADER_BASE + sum(_HEADER_ENTRY + 6 * len(n) for n in names):
        raise WireError("the parameters are larger than the model", why=f"{len(content)} bytes arrived")
    return content


def arrays_in(content: bytes, layout: Layout) -> dict[str, npt.NDArray[Any]]:
    """The arrays of a safetensors file, exactly those of `layout` and not a byte more; views.

    Raises WireError before anything is made of the values.
    """
    header, values = split(content)
    _require_names(header, layout)
    ranges = {name: _range_of(name, header[name], *wanted) for name, wanted in layout.items()}
    end = 0
    for start, stop in sorted(ranges.values(), key=lambda part: (part[0], part[1])):
        if start != end:
            raise WireError("the parameters' values overlap or leave gaps")
        end = stop
    if end != len(values):
        raise WireError("the parameters do not hold the bytes that their header names")
    return {
        name: np.frombuffer(values[slice(*ranges[name])], dtype=_TYPES[kind]).reshape(shape)
        for name, (kind, shape) in layout.items()
    }


def split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and values of a safetensors file. Raises WireError."""
    length = int.from_bytes(content[:_PREFIX], "little")
    try:
        header = json.loads(content[_PREFIX : _PREFIX + length].decode())
    except (ValueError, RecursionError):
        header = None
    if len(content) < _PREFIX + length or not isinstance(header, dict):
        raise WireError("the parameters have no readable header")
    return header, memoryview(content)[_PREFIX + length :]


def _require_names(header: Mapping[str, Any], layout: Iterable[str]) -> None:
    missing, extra = sorted(set(layout) - set(header)), sorted(set(header) - set(layout))
    if missing or extra:
        raise WireError(
            "the parameters have other names than the model's",
            why=f"{len(missing)} missing, {len(extra)} unknown, for example {(missing + extra)[0][:80]!r}",
            fix="use the same model name and version on both sides",
        )


def _range_of(name: str, entry: Any, kind: str, shape: tuple[int, ...]) -> tuple[int, int]:
    """First byte and end of a parameter, when its entry says exactly what is wanted."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) and len(entry) == 3 else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise WireError(f"parameter {name} has no place in the file")
    if entry.get("dtype") != kind or not _equal_ints(entry.get("shape"), shape):
        raise WireError(
            f"parameter {name} arrives in another shape or type",
            why=f"{str(entry.get('shape'))[:80]} of {str(entry.get('dtype'))[:40]}, "
            f"expected {shape} of {kind}",
        )
    start, stop = offsets
    num_bytes = np.dtype(_TYPES[kind]).itemsize * math.prod(shape)
    if start < 0 or stop - start != num_bytes:
        raise WireError(f"parameter {name} does not hold {num_bytes} bytes of values")
    return start, stop


def _equal_ints(found: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(found, list) and all(type(n) is int for n in found) and tuple(found) == shape


def record_bytes(record: ArrayRecord) -> int:
    """Bytes of the encoded arrays, as they travel."""
    return sum(len(array.data) for array in record.values())


def write_safetensors(
    path: Path, parameters: Mapping[str, npt.NDArray[np.float32]], *, mode: int = 0o644
) -> None:
    """Write parameters as safetensors, atomically and without a copy of them."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            for part in _file_parts(parameters):
                file.write(part)

    write_atomically(path, write, mode=mode)


def read_safetensors(path: Path, template: Template | None = None) -> Parameters:
    """Read finite float32 parameters; a `template` also fixes names, shapes and order. Raises WireError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        parameters = load_file(path)
    except (OSError, SafetensorError, ValueError) as error:
        raise WireError(f"{path.name} is not a readable safetensors file", why=type(error).__name__) from None
    if template is None:
        template = template_of({name: parameters[name] for name in sorted(parameters)})
    if {name: array.shape for name, array in parameters.items()} != dict(template):
        raise WireError(f"{path.name} holds another model", why="names or shapes differ from the model's")
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in parameters.values()):
        raise WireError(f"{path.name} holds values that are not finite float32")
    return {name: parameters[name] for name in template}
