"""The server's own account of what each hospital's updates in this run have cost, beside what it states.

A hospital whose ledger was lost in mid-run and begun anew states less than what has left it. The server knows
noise and steps of every update that it received, so it composes them itself, and the larger number stands.
That is a bound from below: charges whose update never came are not in it.

A hospital whose patients were exchanged during the run may rightly state less, the cost to its worst-off
patient. From here both look the same, so the larger number stands there too.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

from common.config import FederationConfig
from common.privacy.accountant import epsilon, running_epsilon
from common.privacy.plan import PrivacyEvent
from server.totals import HospitalTotals

LEAST_NOISE_ACCOUNTED = 0.1
"""Less noise costs more than this does, and more time to compute than a stranger may ask for."""
_ROUNDING = 1e-3
"""Two installations of the same accountant differ by less."""
_LARGEST_LOSS, _MEANINGLESS = 1e6, 100.0
"""More expected loss than this would fill the memory; it is an epsilon beyond all that a claim can mean."""

log = logging.getLogger(__name__)


def recounted(config: FederationConfig, hospitals: Mapping[str, HospitalTotals]) -> dict[str, HospitalTotals]:
    """The totals with the larger of the stated and the composed epsilon; a difference is told.

    For the end of a session: some 0.05 s per hospital, and the exact grid where a statement falls short.
    """
    if not config.claims_privacy:
        return dict(hospitals)
    q = config.privacy.sampling_rate
    return {name: _recounted(name, totals, sampling_rate=q) for name, totals in hospitals.items()}


def _recounted(name: str, totals: HospitalTotals, *, sampling_rate: float) -> HospitalTotals:
    if totals.epsilon is None or totals.delta is None:
        return totals
    events = [
        PrivacyEvent(
            sampling_rate=sampling_rate, noise_multiplier=max(noise, LEAST_NOISE_ACCOUNTED), steps=steps
        )
        for noise, steps in totals.kinds
    ]
    own, stated = _own_epsilon(events, delta=totals.delta, stated=totals.epsilon), totals.epsilon
    if own is None:
        return totals
    log.warning(
        "%s states epsilon %.4f, but the updates that came from it cost %.4f: it has lost charges from its "
        "ledger, or exchanged its patients, during the run; the larger number stands, and may not be all",
        *(name, stated, own),
    )
    return replace(totals, epsilon=own if math.isfinite(own) else stated, understated=True)


def _own_epsilon(events: Sequence[PrivacyEvent], *, delta: float, stated: float) -> float | None:
    """What `events` cost where that is more than `stated` by more than rounding; else None."""
    # KL of a step with and without one patient is at most q / (2 sigma^2), by convexity.
    loss = sum(e.sampling_rate * e.steps / (2 * e.noise_multiplier**2) for e in events)
    if loss > _LARGEST_LOSS:
        return math.inf if stated < _MEANINGLESS else None
    least = stated * (1 + _ROUNDING)
    if running_epsilon(events, delta=delta) <= least:
        return None
    own = epsilon(events, delta=delta)
    return own if own > least else None
