"""What happened over the rounds of a run: pure functions on its record."""

from collections.abc import Sequence
from typing import TypeVar

from server.reporting.round_lines import Reply
from server.reporting.run_record import HospitalSummary, RunRecord

N = TypeVar("N", int, float)

_CURVE_POINTS = 12


def growths(run: RunRecord) -> dict[str, list[tuple[int, float]]]:
    """By hospital, (round, epsilon after it) at about twelve rounds: as reported, else from the plan."""
    replies: dict[str, list[Reply]] = {}
    for (name, _), reply in run.participation.items():
        if reply.outcome != "refused":
            replies.setdefault(name, []).append(reply)
    return {hospital.name: _growth(replies.get(hospital.name, []), hospital) for hospital in run.hospitals}


def _growth(unsorted: Sequence[Reply], hospital: HospitalSummary) -> list[tuple[int, float]]:
    replies = sorted(unsorted, key=lambda r: r.round_number)
    reported = [(r.round_number, r.epsilon) for r in replies if r.epsilon is not None]
    if reported:
        return _thinned(reported)
    updates = hospital.releases or hospital.rounds
    q, sigma, delta = hospital.sample_rate, hospital.noise_multiplier, hospital.delta
    if not (q and sigma and delta and replies and hospital.steps and updates):
        return []
    return _composed(replies, q, sigma, delta, steps=hospital.steps / updates)


def _composed(
    replies: Sequence[Reply], q: float, sigma: float, delta: float, *, steps: float
) -> list[tuple[int, float]]:
    from common.privacy.accountant import running_epsilon
    from common.privacy.plan import PrivacyEvent

    done = [(reply.round_number, round(count * steps)) for count, reply in enumerate(replies, start=1)]
    return [
        (
            number,
            running_epsilon([PrivacyEvent(sampling_rate=q, noise_multiplier=sigma, steps=n)], delta=delta),
        )
        for number, n in _thinned(done)
    ]


def _thinned(points: list[tuple[int, N]]) -> list[tuple[int, N]]:
    """About `_CURVE_POINTS` of the points, the last one always."""
    stride = max(1, -(-len(points) // _CURVE_POINTS))
    return points[::-1][::stride][::-1]


def participation_counts(run: RunRecord) -> dict[str, str]:
    """Per hospital how often each outcome was: `aggregated 58, late 2`."""
    counted: dict[str, dict[str, int]] = {}
    for (name, _), reply in run.participation.items():
        outcomes = counted.setdefault(name, {})
        outcomes[reply.outcome] = outcomes.get(reply.outcome, 0) + 1
    return {name: ", ".join(f"{what} {n}" for what, n in c.items()) for name, c in counted.items()}


def round_seconds(run: RunRecord) -> list[tuple[int, float, float]]:
    """(round, seconds from the first message to its close, seconds of the longest training)."""
    rows = []
    replies: dict[tuple[int, int], list[Reply]] = {}
    for reply in run.replies:
        replies.setdefault((reply.round_number, reply.attempt), []).append(reply)
    for closed in run.rounds:
        here = replies.get((closed.round_number, closed.attempt), [])
        if sent := [reply.sent for reply in here if reply.sent is not None]:
            longest = max((reply.training_s or 0.0 for reply in here), default=0.0)
            rows.append((closed.round_number, max(0.0, closed.closed - min(sent)), longest))
    return rows
