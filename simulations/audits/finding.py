"""What an audit found. An audit runs the production path as it is installed and judges what comes out."""

from collections.abc import Mapping
from dataclasses import dataclass, field

ALPHA = 1e-6
"""Probability of a false alarm of one statistical check."""

CLAIMED = "claimed epsilon"
EMPIRICAL = "empirical epsilon, lower bound"
CONFIDENCE = "confidence of the bound"
"""Keys of `Finding.numbers` that the page shows beside each other."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """The outcome of one audit."""

    audit: str
    """Name, for example `noise-calibration`."""
    passed: bool
    """False proves a defect, up to a false alarm; True proves nothing by itself."""
    said: str
    """One sentence for a person: what was tried and what came out."""
    numbers: Mapping[str, float] = field(default_factory=dict)
    """What was measured; epsilon bounds stand beside the claim they are compared with."""
    black_box: bool = False
    """Whether only what leaves the hospital was looked at."""
    wall_s: float = 0.0
    pictures: tuple[str, ...] = ()
    """Names of image files that the audit wrote for people."""
