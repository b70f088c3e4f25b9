"""What DP-SGD does in one hospital: the plan before it, the event after it.

One frozen plan owns sampling rate, clip, noise and steps, and makes the accounting event itself, so that what
runs and what is accounted cannot disagree. An event says what was done; what it costs is a function of it
(`common.privacy.accountant`).

Guarantee: (epsilon, delta)-differential privacy of everything that leaves the hospital, against everybody who
sees it, for adding or removing one unit: one patient with all their images, or one image where no patient is
known. Mechanism of one step: every enrolled unit enters with probability q on its own (Poisson), each unit's
summed gradient is clipped to norm C, Gaussian noise of standard deviation sigma * C is added to the sum.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal, Self

NEIGHBOURING_RELATION = "add or remove one unit"
"""Two data sets are neighbours when one has one more unit; the number of units is private."""

Unit = Literal["patient", "image"]
Clipping = Literal["flat", "automatic"]
"""What brings a unit's gradient g to a norm of at most C: g min(1, C / |g|), or g C / (|g| + 0.01)."""


@dataclass(frozen=True, kw_only=True)
class PrivacyEvent:
    """`steps` Poisson-subsampled Gaussian steps that were carried out. Its meaning never changes."""

    sampling_rate: float
    """Probability q in (0, 1] with which each unit entered a step; 1 is full batch."""
    noise_multiplier: float
    """Noise standard deviation over the clipping norm; 0 is no privacy at all (epsilon is infinite)."""
    steps: int
    """Number of such steps, at least 0."""

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        if not (math.isfinite(self.noise_multiplier) and self.noise_multiplier >= 0):
            raise ValueError(f"noise_multiplier must be finite and at least 0, got {self.noise_multiplier}")
        if self.steps != int(self.steps) or self.steps < 0:
            raise ValueError(f"steps must be a whole number of at least 0, got {self.steps}")

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read plain values; raises ValueError for missing, unknown or impossible ones."""
        return cls(**_exact_fields(cls, values))


@dataclass(frozen=True, kw_only=True)
class PrivacyPlan:
    """How a hospital trains one round under differential privacy; every number in it may be published."""

    sampling_rate: float
    """Probability q in (0, 1] with which each unit enters a step."""
    l2_clip_norm: float
    """Bound C on the l2 norm of one unit's summed gradient."""
    noise_multiplier: float
    """Sigma: noise standard deviation over C."""
    steps: int
    """DP-SGD steps in one round."""
    enrolled_units: int
    """The hospital's public, rounded count n; never the true one."""
    max_rows_per_unit: int
    """At most this many rows (images) of a unit enter a step (K)."""
    unit: Unit
    """Who is protected."""
    clipping: Clipping = "flat"
    """How gradients are clipped to C; the bound, and so the guarantee, is the same."""

    def __post_init__(self) -> None:
        if not 0 < self.sampling_rate <= 1:
            raise ValueError(f"sampling_rate must be in (0, 1], got {self.sampling_rate}")
        for name in ("l2_clip_norm", "noise_multiplier"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) > 0):
                raise ValueError(f"{name} must be positive and finite, got {getattr(self, name)}")
        for name in ("steps", "enrolled_units", "max_rows_per_unit"):
            if getattr(self, name) != int(getattr(self, name)) or getattr(self, name) < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {getattr(self, name)}")
        if self.unit not in ("patient", "image"):
            raise ValueError(f"unit must be 'patient' or 'image', got {self.unit!r}")
        if self.clipping not in ("flat", "automatic"):
            raise ValueError(f"clipping must be 'flat' or 'automatic', got {self.clipping!r}")

    @property
    def expected_batch_size(self) -> float:
        """Q * n for the public n: the only divisor of a noisy gradient sum."""
        return self.sampling_rate * self.enrolled_units

    @property
    def noise_stddev(self) -> float:
        """Standard deviation of the noise on a sum of clipped gradients."""
        return self.noise_multiplier * self.l2_clip_norm

    def event(self) -> PrivacyEvent:
        """What one round of this plan does, for the accountant and the ledger."""
        return PrivacyEvent(
            sampling_rate=self.sampling_rate, noise_multiplier=self.noise_multiplier, steps=self.steps
        )

    def digest(self) -> str:
        """Hexadecimal SHA-256 over all numbers of the plan."""
        return hashlib.sha256(json.dumps(self.to_dict(), sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, Any]:
        """Plain values, the inverse of `from_dict`."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read plain values; raises ValueError for missing, unknown or impossible ones."""
        return cls(**_exact_fields(cls, values))


def _exact_fields(kind: type, values: Mapping[str, Any]) -> dict[str, Any]:
    wanted = {field.name for field in fields(kind)}
    if set(values) != wanted:
        raise ValueError(f"{kind.__name__} needs exactly {sorted(wanted)}, got {sorted(values)}")
    return dict(values)
