"""The file formats: how a network is written, read back and run without any code of this project."""

import json
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from client.export.kind import ModelFormat
from common.errors import ConfigError, ModelError

if TYPE_CHECKING:
    import torch

INPUT, OUTPUT = "images", "probabilities"
METADATA = "metadata.json"
"""Name under which a torch file keeps its metadata."""
_OPSET = 18
Run = Callable[[NDArray[np.float32]], NDArray[np.float32]]
"""(rows, channels, side, side) to (rows, classes)."""


@dataclass(frozen=True)
class Written:
    """A file that was read back."""

    run: Run
    metadata: Mapping[str, str]


def write(kind: ModelFormat, network: "torch.nn.Module", side: int, channels: int, path: Path) -> None:
    """Write `network` without metadata. Raises ModelError where that cannot be."""
    import torch

    if kind is ModelFormat.ONNX:
        _require_onnx()
    example = torch.zeros(2, channels, side, side)
    rows = torch.export.Dim("rows", min=1)
    with _quiet(), torch.no_grad():
        try:
            program = torch.export.export(network, (example,), dynamic_shapes={"images": {0: rows}})
            if kind is ModelFormat.TORCH:
                torch.export.save(program, path)
            else:
                found: Any = torch.onnx.export(
                    program,
                    dynamo=True,
                    opset_version=_OPSET,
                    verbose=False,
                    external_data=False,
                    input_names=[INPUT],
                    output_names=[OUTPUT],
                )
                found.save(path)
        except (ConfigError, OSError):
            raise
        except Exception as error:  # the exporter raises whatever its parts raise
            lines = str(error).strip().splitlines() or [""]
            raise ModelError(
                f"this model cannot be exported to {kind.value}",
                why=f"{type(error).__name__}: {lines[0][:200]}",
                fix="try the other format, or use `flower-client predict`",
            ) from None


def add_metadata(kind: ModelFormat, path: Path, metadata: Mapping[str, str]) -> None:
    """Put texts by name into a file that `write` made."""
    if kind is ModelFormat.ONNX:
        import onnx

        model = onnx.load(str(path))
        onnx.helper.set_model_props(model, dict(metadata))
        onnx.checker.check_model(model)
        onnx.save(model, str(path))
        return
    import torch

    with _quiet():
        program = torch.export.load(path)
        torch.export.save(program, path, extra_files={METADATA: json.dumps(dict(metadata))})


def read(kind: ModelFormat, path: Path) -> Written:
    """Read a file as another program would: onnxruntime or torch alone, on the CPU."""
    return _read_onnx(path) if kind is ModelFormat.ONNX else _read_torch(path)


def _read_onnx(path: Path) -> Written:
    _require_onnx()
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        return np.asarray(session.run([OUTPUT], {INPUT: images})[0])

    return Written(run, dict(session.get_modelmeta().custom_metadata_map))


def _read_torch(path: Path) -> Written:
    import torch

    kept: dict[str, Any] = {METADATA: ""}
    with _quiet():
        network = torch.export.load(path, extra_files=kept).module()

    def run(images: NDArray[np.float32]) -> NDArray[np.float32]:
        with torch.inference_mode():
            return np.asarray(network(torch.from_numpy(images)).numpy())

    text = kept[METADATA]
    return Written(run, json.loads(text) if text else {})


def _require_onnx() -> None:
    import importlib.util

    missing = [n for n in ("onnx", "onnxscript", "onnxruntime") if importlib.util.find_spec(n) is None]
    if missing:
        raise ConfigError(
            f"for ONNX {', '.join(missing)} must be installed",
            why="only those who export need them, so that they are an extra",
            fix="pip install 'hospital-federation[export]', or choose --format torch",
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' words about themselves, which nobody here can act on."""
    import logging

    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
