"""The names of the file formats; imports nothing, for the command line."""

from enum import StrEnum


class ModelFormat(StrEnum):
    """What can be written."""

    ONNX = "onnx"
    TORCH = "torch"
