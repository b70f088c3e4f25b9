"""How heat maps are made; imports nothing, for the command line."""

from enum import StrEnum


class HeatMethod(StrEnum):
    """Names of the methods (`client.prediction.heat_map` and docs/predict.md say what each is)."""

    COMBINED = "combined"
    GRADCAM = "gradcam"
    INTEGRATED_GRADIENTS = "integrated-gradients"
