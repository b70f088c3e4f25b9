"""The second epsilon: against an outsider, who sees the final model and nothing of single hospitals.

Claim, for one hospital k, in a run of one local SGD step per round. The update of hospital j is then

    u_j = a - l (S_j + Z_j) / (q n_j),    Z_j ~ N(0, (sigma_j C)^2 I),

with a (weight decay; momentum starts afresh) and the learning rate l the same whoever the patients are, S_j
the sum of the clipped gradients over its own Poisson sample, n_j the count that it states. The server forms
the mean of the u_j with weights w_j, the enrolled counts that the run has bound, or their squares
(`server.weighting`). Up to public constants it is

    sum_j c_j S_j + N(0, sum_j (c_j sigma_j C)^2 I),    c_j = w_j / n_j.

One patient of k more or less moves it by at most c_k C, and enters with probability q. Given all earlier
means, the other hospitals' sums do not depend on k's patients, and all noise is independent of them: for k
the round is one Poisson-subsampled Gaussian mechanism with noise multiplier

    sigma_eff(k) = sqrt(sum_j (c_j sigma_j)^2) / c_k,    at least sigma_k.

Rounds compose adaptively. Server optimiser, moving average and every model of the run are computed from the
means alone (post-processing), so the claim also holds against somebody who sees all global models.

Which rounds count: those that are in the model. A round that was given up, or that was trained again after a
checkpoint was restored, has no influence on it in its first form; an update that came late or was refused is
in no mean. The hospital's own epsilon counts them all. Who took part in a round is taken to be independent of
the patients, as everywhere: an honest update, of a hospital with no more patients than it has enrolled, is
refused for its norm with probability below 1e-12 (`server.update_checks.update_norm_bound`).

Updates in whole numbers (`common.quantisation`). In units of the spacing, a number of hospital j leaves as
R_j = floor(X_j + U_j), X_j = x_j + N(0, t_j^2), U_j uniform; nothing is cut off. The law of R_j is the
density of N(x_j, t_j^2) plus a triangle on (-1, 1), read at the whole numbers. The density of the sum over j
of all these, read at the whole numbers, is the law of round(X_1 + ... + X_K + V) with V independent: the
Gaussian sum above, post-processed. The law of R_1 + ... + R_K differs from it only by aliases, products of
spectra that are a whole frequency apart: at most about exp(-2 pi^2 t_k^2 t^2 / (t_k^2 + t^2)), t^2 summed
over the others (Poisson summation). Where the spacing is at most `update_grid.FINE` = 0.4 of each standard
deviation, all t are 2.5 or more and that is 2e-27: nothing, also over all parameters and rounds. A hospital
with less noise helps nobody and is helped by nobody in that round. The spacings of such runs follow from
plan and stated noise alone, never from updates.

Assumed: no hospital colludes with the outsider, every stated noise multiplier is true, all noise is drawn
independently, and its finer rounding does not matter (each hospital's noise lies on a grid of its own, and
each update is rounded to float32, before the mean is formed). The aggregation rule is the weighted mean, the
only one there is. Where anything else holds, the second epsilon is the first, and the reason is said.
"""

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from common.config import FederationConfig, ServerSection
from common.privacy.accountant import running_epsilon
from common.privacy.plan import PrivacyEvent
from server.run_state import RunState
from server.totals import HospitalTotals
from server.update_grid import FINE, noise_in_update
from server.weighting import weight_of

PROVEN = (
    "one local SGD step per round: the model holds only weighted sums of the hospitals' updates, and all "
    "their noise hides each of them; no colluding hospital, all stated noise true and independent"
)
SEVERAL_STEPS = "the same: with several local steps per round an update is no plain noisy sum"
NOT_SGD = "the same: this local optimiser does not keep sums of noise Gaussian"
ALONE = "the same: no other hospital's noise was in its averages"
ROUNDED = "the same: updates were rounded too coarsely for their noise to be known to add up"
INCOMPLETE_RECORD = "the same: the record of the aggregated rounds is incomplete"
NO_COST_STATED = "the same: the hospital has stated no cost"

_MOST_KINDS = 4
"""Different noise per hospital that is composed exactly; more are rounded down into so many."""
_DIGITS = 6


@dataclass(frozen=True, kw_only=True)
class Contribution:
    """One update in one average; public numbers only."""

    hospital: str
    weight: float
    """Its weight in the average, of any scale."""
    divided_by: float
    """The count that the hospital divides its noisy sum by (times the sampling rate)."""
    noise_multiplier: float
    adds_up: bool = True
    """Whether it was rounded finely enough, compared with its noise, for the others' noise to add to it."""


@dataclass(frozen=True, kw_only=True)
class OutsiderCost:
    """What a run has cost a hospital's worst patient against an outsider."""

    epsilon: float | None
    """At the hospital's delta; None where it has stated no cost."""
    is_proven: bool
    """Whether the model's averages alone were counted; if not, `epsilon` is the one against the server."""
    reason: str


def effective_noise_multipliers(contributions: Sequence[Contribution]) -> dict[str, float]:
    """By hospital, the noise of one average over what one of its patients can move it; see the module.

    Rounded down to six digits, never below the hospital's own. Example: two hospitals of any size that divide
    by their weights, noise multipliers 3 and 4, both have 5.
    """
    stds = [c.weight / c.divided_by * c.noise_multiplier for c in contributions if c.adds_up]
    together = math.hypot(*stds)
    return {
        c.hospital: max(c.noise_multiplier, _rounded_down(together * c.divided_by / c.weight))
        if c.adds_up
        else c.noise_multiplier
        for c in contributions
    }


def outsider_events(
    rounds: Iterable[Sequence[Contribution]], *, sampling_rate: float
) -> dict[str, list[PrivacyEvent]]:
    """By hospital, what an outsider has seen of it: one subsampled Gaussian step per average it is in."""
    noise: dict[str, list[float]] = {}
    for contributions in rounds:
        for hospital, sigma in effective_noise_multipliers(contributions).items():
            noise.setdefault(hospital, []).append(sigma)
    return {
        hospital: [
            PrivacyEvent(sampling_rate=sampling_rate, noise_multiplier=sigma, steps=1)
            for sigma in _few_kinds(sigmas)
        ]
        for hospital, sigmas in noise.items()
    }


def outsider_costs(
    config: FederationConfig, state: RunState, lines: Sequence[Mapping[str, Any]]
) -> dict[str, OutsiderCost]:
    """The second epsilon of every hospital of a run that claims privacy; empty for one that does not.

    `lines` are those of metrics.jsonl. Some 0.03 s per hospital, 0.2 s where many rounds had different noise.
    """
    if not config.claims_privacy:
        return {}
    same = same_because(config)
    rounds = None if same else aggregated_rounds(config, lines, state)
    if rounds is None:
        reason = same or INCOMPLETE_RECORD
        return {name: _same(totals, reason) for name, totals in state.hospitals.items()}
    events = outsider_events(rounds, sampling_rate=config.privacy.sampling_rate)
    in_company = {c.hospital for contributions in rounds if len(contributions) > 1 for c in contributions}
    helped = {
        c.hospital for contributions in rounds if _add_up(contributions) for c in contributions if c.adds_up
    }
    reasons = {name: ROUNDED if name in in_company else ALONE for name in events if name not in helped}
    return {
        name: _cost(totals, events.get(name, []), unhelped=reasons.get(name))
        for name, totals in state.hospitals.items()
    }


def _add_up(contributions: Sequence[Contribution]) -> bool:
    return sum(c.adds_up for c in contributions) > 1


def same_because(config: FederationConfig) -> str | None:
    """Why this plan's second epsilon is the first; None where the proof holds."""
    if config.privacy.local_steps != 1:
        return SEVERAL_STEPS
    return None if config.training.optimizer == "sgd" else NOT_SGD


def aggregated_rounds(
    config: FederationConfig, lines: Sequence[Mapping[str, Any]], state: RunState
) -> list[list[Contribution]] | None:
    """The updates in each average of the model; None unless all rounds and all numbers are there.

    Lines of rounds that the model does not hold (given up, or after the checkpoint) are left out.
    """
    closings = {line["round"]: line for line in lines if "closed" in line}
    closed = {number: line.get("aggregated") for number, line in closings.items()}
    counted: dict[int, list[Mapping[str, Any]]] = {number: [] for number in range(1, state.round_number + 1)}
    for line in lines:
        if "hospital" in line and line.get("outcome") == "aggregated" and line["round"] in counted:
            counted[line["round"]].append(line)
    rounds = []
    for number, mine in counted.items():
        least = _least_noise(config, closings.get(number, {}), round_number=number)
        made = (_contribution(line, least or 0.0, config.server) for line in mine)
        contributions = [c for c in made if c is not None]
        hospitals = {c.hospital for c in contributions}
        if not closed.get(number) == len(contributions) == len(mine) == len(hospitals) or least is None:
            return None
        rounds.append(contributions)
    in_rounds = Counter(c.hospital for contributions in rounds for c in contributions)
    is_whole = all(in_rounds[name] == totals.rounds for name, totals in state.hospitals.items())
    return rounds if is_whole and in_rounds.keys() <= state.hospitals.keys() else None


def _least_noise(config: FederationConfig, closing: Mapping[str, Any], *, round_number: int) -> float | None:
    """The noise multiplier, for weight over count 1, from which on the round's spacing is fine enough.

    0 for float32 updates, None where the record does not say how they travelled.
    """
    exponent = closing.get("coarsest_grid_exponent", "missing")
    if exponent is None:
        return 0.0
    if not isinstance(exponent, int):
        return None
    noise = noise_in_update(config.public_plan, round_number=round_number)
    return float(2.0**exponent / (FINE * noise))


def _contribution(line: Mapping[str, Any], least_noise: float, server: ServerSection) -> Contribution | None:
    """The contribution that an aggregated line tells of, None unless it was exactly one private step."""
    values = [line.get(key) for key in ("enrolled_patients", "stated_patients", "noise_multiplier")]
    numbers = [float(v) for v in values if isinstance(v, int | float) and math.isfinite(v) and v > 0]
    if len(numbers) != len(values) or line.get("steps") != 1:
        return None
    enrolled, divided_by, noise_multiplier = numbers
    weight = float(weight_of(server, enrolled_patients=int(enrolled)))
    return Contribution(
        hospital=str(line["hospital"]),
        weight=weight,
        divided_by=divided_by,
        noise_multiplier=noise_multiplier,
        adds_up=noise_multiplier * weight / divided_by >= least_noise,
    )


def _cost(totals: HospitalTotals, events: Sequence[PrivacyEvent], *, unhelped: str | None) -> OutsiderCost:
    if totals.epsilon is None or totals.delta is None:
        return _same(totals, NO_COST_STATED)
    if unhelped is not None:
        return _same(totals, unhelped)
    epsilon = running_epsilon(events, delta=totals.delta)
    if totals.epsilon_complete:  # the model is computed from what the hospital has let out
        epsilon = min(epsilon, totals.epsilon)
    return OutsiderCost(epsilon=epsilon, is_proven=True, reason=PROVEN)


def _same(totals: HospitalTotals, reason: str) -> OutsiderCost:
    return OutsiderCost(epsilon=totals.epsilon, is_proven=False, reason=reason)


def _few_kinds(sigmas: Sequence[float]) -> list[float]:
    """The noise multipliers, each rounded down to one of at most four: less noise costs more, never less."""
    if len(set(sigmas)) <= _MOST_KINDS:
        return list(sigmas)
    least, most = min(sigmas), max(sigmas)
    width = math.log(most / least) / _MOST_KINDS
    groups: dict[int, list[float]] = {}
    for sigma in sigmas:
        groups.setdefault(min(int(math.log(sigma / least) / width), _MOST_KINDS - 1), []).append(sigma)
    return [min(group) for group in groups.values() for _ in group]


def _rounded_down(value: float) -> float:
    scale = 10.0 ** (_DIGITS - 1 - math.floor(math.log10(value)))
    return math.floor(value * scale) / scale
