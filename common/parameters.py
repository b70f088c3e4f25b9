"""Model parameters as named float32 arrays: hashing, files, and careful decoding of what arrives.

Parameters are `dict[str, np.ndarray]` in the model's own order. Whatever comes from another machine is
checked against a template of names and shapes before its bytes are turned into arrays.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord

from common.errors import WireError
from common.files import write_bytes_atomically

Parameters = dict[str, npt.NDArray[np.float32]]
Template = Mapping[str, tuple[int, ...]]
"""Names and shapes that parameters must have."""

ENTRY, SAFETENSORS = "parameters", "safetensors"
"""Name and encoding of the one entry in a record of arrays."""
_PREFIX = 8
_HEADER_BASE, _HEADER_ENTRY = 64, 256
"""Bytes that a header may take: for itself, and for each parameter beside its name."""


def template_of(parameters: Mapping[str, npt.NDArray[np.float32]]) -> dict[str, tuple[int, ...]]:
    """Names and shapes of `parameters`."""
    return {name: array.shape for name, array in parameters.items()}


def parameters_sha256(parameters: Mapping[str, npt.NDArray[np.float32]]) -> str:
    """SHA-256 over names, shapes and float32 bytes in name order; equal for equal models on any engine."""
    digest = hashlib.sha256()
    for name in sorted(parameters):
        array = _little_endian(parameters[name])
        digest.update(f"{name}:{array.shape}\n".encode())
        digest.update(array.data)
    return digest.hexdigest()


def _little_endian(array: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    return np.asarray(array, dtype="<f4", order="C")  # unlike ascontiguousarray it keeps shape ()


def l2_norm(parameters: Mapping[str, npt.NDArray[np.float32]]) -> float:
    """Euclidean norm over all arrays, accumulated in float64; infinite values give inf, NaN gives nan."""
    return math.sqrt(sum(float(np.sum(np.square(array, dtype=np.float64))) for array in parameters.values()))


def difference(
    minuend: Mapping[str, npt.NDArray[np.float32]], subtrahend: Mapping[str, npt.NDArray[np.float32]]
) -> Parameters:
    """`minuend - subtrahend`, array by array."""
    return {name: minuend[name] - subtrahend[name] for name in minuend}


def to_record(parameters: Mapping[str, npt.NDArray[np.float32]]) -> ArrayRecord:
    """Encode as Flower's record: one entry, the model as a safetensors file of little-endian float32.

    One entry because Flower asks for every entry of a record by requests of its own.
    """
    from safetensors.numpy import save

    content = save({name: _little_endian(array) for name, array in parameters.items()})
    return ArrayRecord({ENTRY: Array("uint8", (len(content),), SAFETENSORS, content)})


def from_record(record: ArrayRecord, template: Template) -> Parameters:
    """Decode what arrived, refusing other names, shapes, dtypes, sizes and non-finite values.

    The header is compared with `template` before anything is made of the values, which are not copied.
    Raises WireError; its text names parameters only.
    """
    array = record.get(ENTRY)
    if array is None or len(record) != 1 or array.stype != SAFETENSORS:
        raise WireError(f"the parameters do not arrive as one {SAFETENSORS} entry named {ENTRY!r}")
    content = array.data
    num_values = sum(math.prod(shape) for shape in template.values())
    longest = 4 * num_values + _PREFIX + _HEADER_BASE + sum(_HEADER_ENTRY + 6 * len(n) for n in template)
    if len(content) > longest:
        raise WireError("the parameters are larger than the model", why=f"{len(content)} bytes arrived")
    header, values = _split(content)
    _require_names(header, template)
    layout = {name: _range_of(name, header[name], shape) for name, shape in template.items()}
    end = 0
    for start, stop in sorted(layout.values(), key=lambda part: (part[0], part[1])):
        if start != end:
            raise WireError("the parameters' values overlap or leave gaps")
        end = stop
    if end != len(values):
        raise WireError("the parameters do not hold the bytes that their header names")
    return {name: _values_of(name, values[slice(*layout[name])], shape) for name, shape in template.items()}


def _split(content: bytes) -> tuple[dict[str, Any], memoryview]:
    """Header and values of a safetensors file."""
    length = int.from_bytes(content[:_PREFIX], "little")
    try:
        header = json.loads(content[_PREFIX : _PREFIX + length].decode())
    except (ValueError, RecursionError):
        header = None
    if len(content) < _PREFIX + length or not isinstance(header, dict):
        raise WireError("the parameters have no readable header")
    return header, memoryview(content)[_PREFIX + length :]


def _require_names(header: Mapping[str, Any], template: Template) -> None:
    missing, extra = sorted(set(template) - set(header)), sorted(set(header) - set(template))
    if missing or extra:
        raise WireError(
            "the parameters have other names than the model's",
            why=f"{len(missing)} missing, {len(extra)} unknown, for example {(missing + extra)[0][:80]!r}",
            fix="use the same model name and version on both sides",
        )


def _range_of(name: str, entry: Any, shape: tuple[int, ...]) -> tuple[int, int]:
    """First byte and end of a parameter, when its entry says exactly what the template wants."""
    offsets = entry.get("data_offsets") if isinstance(entry, dict) and len(entry) == 3 else None
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(type(o) is int for o in offsets):
        raise WireError(f"parameter {name} has no place in the file")
    if entry.get("dtype") != "F32" or not _equal_ints(entry.get("shape"), shape):
        raise WireError(
            f"parameter {name} arrives in another shape or type",
            why=f"{str(entry.get('shape'))[:80]} of {str(entry.get('dtype'))[:40]}, expected {shape} of F32",
        )
    start, stop = offsets
    if start < 0 or stop - start != 4 * math.prod(shape):
        raise WireError(f"parameter {name} does not hold {4 * math.prod(shape)} bytes of values")
    return start, stop


def _equal_ints(found: Any, shape: tuple[int, ...]) -> bool:
    return isinstance(found, list) and all(type(n) is int for n in found) and tuple(found) == shape


def _values_of(name: str, content: memoryview, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    values = np.frombuffer(content, dtype="<f4").reshape(shape)
    if not np.isfinite(values).all():
        raise WireError(f"parameter {name} holds values that are not finite")
    return values


def record_bytes(record: ArrayRecord) -> int:
    """Bytes of the encoded arrays, as they travel."""
    return sum(len(array.data) for array in record.values())


def write_safetensors(
    path: Path, parameters: Mapping[str, npt.NDArray[np.float32]], *, mode: int = 0o644
) -> None:
    """Write parameters as safetensors, atomically."""
    from safetensors.numpy import save

    write_bytes_atomically(
        path, save({name: _little_endian(array) for name, array in parameters.items()}), mode=mode
    )


def read_safetensors(path: Path, template: Template | None = None) -> Parameters:
    """Read finite float32 parameters; a `template` also fixes names, shapes and order. Raises WireError."""
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        parameters = load(path.read_bytes())
    except (OSError, SafetensorError, ValueError) as error:
        raise WireError(f"{path.name} is not a readable safetensors file", why=type(error).__name__) from None
    if template is None:
        template = template_of({name: parameters[name] for name in sorted(parameters)})
    if {name: array.shape for name, array in parameters.items()} != dict(template):
        raise WireError(f"{path.name} holds another model", why="names or shapes differ from the model's")
    if not all(array.dtype == np.float32 and np.isfinite(array).all() for array in parameters.values()):
        raise WireError(f"{path.name} holds values that are not finite float32")
    return {name: parameters[name] for name in template}
