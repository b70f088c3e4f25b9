"""Model parameters as named float32 arrays: hashing, files, and careful decoding of what arrives.

Parameters are `dict[str, np.ndarray]` in the model's own order. Whatever comes from another machine is
checked against a template of names and shapes before its bytes are turned into arrays.
"""

import hashlib
import io
import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from flwr.app import Array, ArrayRecord
from numpy.lib import format as npy_format

from common.errors import WireError
from common.files import write_bytes_atomically

Parameters = dict[str, npt.NDArray[np.float32]]
Template = Mapping[str, tuple[int, ...]]
"""Names and shapes that parameters must have."""

_HEADER_LIMIT = 4096


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
    """Encode as Flower's record: one `.npy` of little-endian float32 per name."""
    return ArrayRecord({name: Array(_little_endian(array)) for name, array in parameters.items()})


def from_record(record: ArrayRecord, template: Template) -> Parameters:
    """Decode what arrived, refusing other names, shapes, dtypes, sizes and non-finite values.

    Nothing is allocated before the header of each array has been compared with `template`.
    Raises WireError; its text names parameters only.
    """
    if set(record.keys()) != set(template):
        missing = sorted(set(template) - set(record.keys()))
        extra = sorted(set(record.keys()) - set(template))
        raise WireError(
            "the parameters have other names than the model's",
            why=f"{len(missing)} missing, {len(extra)} unknown, for example {(missing + extra)[0][:80]!r}",
            fix="use the same model name and version on both sides",
        )
    return {name: _decode(name, record[name], shape) for name, shape in template.items()}


def _decode(name: str, array: Array, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    num_bytes = 4 * math.prod(shape)
    if array.stype != "numpy.ndarray" or not num_bytes <= len(array.data) <= num_bytes + _HEADER_LIMIT:
        raise WireError(
            f"parameter {name} does not arrive as a float32 array of shape {shape}",
            why=f"encoding {array.stype[:40]!r}, {len(array.data)} bytes, expected about {num_bytes}",
        )
    stream = io.BytesIO(array.data)
    try:
        version = npy_format.read_magic(stream)
        if version != (1, 0):
            raise ValueError("unknown npy version")
        header_shape, fortran_order, dtype = npy_format.read_array_header_1_0(
            stream, max_header_size=_HEADER_LIMIT
        )
    except Exception:  # numpy parses Python literals here: a hostile header raises almost anything
        raise WireError(f"parameter {name} is not an npy array") from None
    if header_shape != shape or dtype != np.dtype("<f4") or fortran_order:
        raise WireError(
            f"parameter {name} arrives in another shape or type",
            why=f"{str(header_shape)[:80]} of {str(dtype)[:40]}, expected {shape} of float32",
        )
    if len(array.data) - stream.tell() != num_bytes:
        raise WireError(f"parameter {name} does not hold {num_bytes} bytes of values")
    values = np.frombuffer(array.data, dtype="<f4", offset=stream.tell()).reshape(shape)
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
