"""Accounting audits: what a hospital's answers really hold is what its ledger was charged for.

A whole hospital is asked through its ClientApp. How many noisy steps of which noise an answer holds is
measured from the answers (black box), and what they cost is computed anew with dp-accounting; charges and
claims that are smaller are found out: steps that were not counted, a client sampling rate multiplied in, less
noise than charged, counts about validation patients that nobody paid for.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import RecordDict

from client.ledger.records import Charge
from common import messages
from common.config import PublicPlan
from simulations.audits import hospital_at_work as site
from simulations.audits.chance import Vector, correlation_p_value, suspicious, variance_p_value
from simulations.audits.finding import CLAIMED, Finding
from simulations.audits.probe import same_global_seeds

CLIP = 0.5
TRAINING, EVALUATION = "training", "evaluation"
_CLOSE = 1.005
"""A claim may be this much below the recomputed cost: grids of the privacy loss differ."""
_ROUNDING_VARIANCE = 1 / 12


def recomputed_epsilon(*, sampling_rate: float, noise_multiplier: float, steps: int, delta: float) -> float:
    """Cost of subsampled Gaussian steps by dp-accounting itself; nothing of ours in between."""
    import dp_accounting
    from dp_accounting.pld import PLDAccountant

    step = dp_accounting.GaussianDpEvent(noise_multiplier)
    if sampling_rate < 1:
        step = dp_accounting.PoissonSampledDpEvent(sampling_rate, step)
    accountant = PLDAccountant(dp_accounting.NeighboringRelation.ADD_OR_REMOVE_ONE, 1e-3)
    return float(accountant.compose(dp_accounting.SelfComposedDpEvent(step, steps)).get_epsilon(delta))


def audit_accounting(
    *,
    rounds: int = 6,
    steps: int = 2,
    side: int = 64,
    sampling_rates: Sequence[float] = (1.0, 0.5),
    policy: Mapping[str, Any] | None = None,
) -> Finding:
    """Black-box: noisy steps in the updates, and what ledger and answers say that they cost.

    `policy` is the hospital's, a fixed noise multiplier of 2 without one.
    """
    wrong: list[str] = []
    p_values: dict[str, float] = {}
    numbers: dict[str, float] = {}
    site.become_a_task()
    with tempfile.TemporaryDirectory() as folder:
        for number, rate in enumerate(sampling_rates):
            plan = site.make_public_plan(side=side, local_steps=steps, sampling_rate=rate, l2_clip_norm=CLIP)
            toml = site.make_hospital(Path(folder) / str(number), side=side, policy=policy)
            answers = [_asked(toml, plan, round_number=n) for n in range(1, rounds + 1)]
            charges = site.charges(toml, purpose=TRAINING)
            if len(charges) != rounds:
                wrong.append(f"{rounds} updates and {len(charges)} charges at sampling rate {rate:g}")
                continue
            wrong += _cheaper_than_done(answers, charges, rate=rate, steps=steps)
            claimed = float(messages.metrics_of(answers[-1])[messages.EPSILON])
            numbers[f"claimed epsilon at sampling rate {rate:g}"] = claimed
            if rate == 1:
                sums = np.stack([site.summed_update(answer, plan) for answer in answers])
                p_values["noisy steps"], numbers["noisy steps in an update"] = _steps_seen(sums, charges)
                numbers |= {CLAIMED: claimed, "steps charged for an update": float(_event(charges[0])[2])}
        told, p_values["two hospitals share no noise"] = _compared_hospitals(Path(folder), side=side)
        wrong += told
    wrong += suspicious(p_values)
    said = (
        f"{rounds} updates hold the noisy steps that they were charged for, and the claim is what they cost."
    )
    if wrong:
        said = f"Ledger and answers disagree: {'; '.join(wrong)}."
    numbers |= {f"p, {name}": p for name, p in p_values.items()}
    return Finding(audit="accounting", passed=not wrong, said=said, numbers=numbers, black_box=True)


def audit_charged_counts(*, evaluations: int = 12) -> Finding:
    """Black-box: counts about validation patients are noised as charged, and every release is charged."""
    wrong: list[str] = []
    site.become_a_task()
    with tempfile.TemporaryDirectory() as folder:
        plan = site.make_public_plan(side=8)
        toml = site.make_hospital(Path(folder) / "north", side=8)
        answers = [
            _asked(toml, plan, kind=messages.EVALUATE, round_number=n) for n in range(1, evaluations + 1)
        ]
        charges = site.charges(toml, purpose=EVALUATION)
        beside = site.charges(toml, purpose=TRAINING)
    counts = np.stack([site.counts_of(answer) for answer in answers])
    numbers: dict[str, float] = {"evaluations": evaluations, "cells": counts.shape[1]}
    if len(charges) != evaluations or beside:
        wrong.append(f"{evaluations} releases of counts and {len(charges)} charges")
    else:
        wrong += _cheaper_than_done(answers, charges, rate=1.0, steps=1)
        # One patient changes one cell of the confusion matrix and one of the histograms.
        noise = np.sqrt(2 * _event(charges[0])[1] ** 2 + _ROUNDING_VARIANCE)
        rest = (counts - counts.mean(axis=0)).ravel()
        freedom = (evaluations - 1) * counts.shape[1]
        p_values = {"noise of the counts": variance_p_value(rest, stddev=noise, freedom=freedom)}
        numbers["p, noise of the counts"] = p_values["noise of the counts"]
        numbers["measured over charged standard deviation"] = float(
            np.sqrt(np.sum(rest**2) / freedom) / noise
        )
        numbers[CLAIMED] = float(messages.metrics_of(answers[-1])[messages.EPSILON])
        wrong += suspicious(p_values)
    said = f"{evaluations} releases of counts about validation patients were noised and charged."
    if wrong:
        said = f"Counts leave that are not paid for: {'; '.join(wrong)}."
    return Finding(audit="accounting of counts", passed=not wrong, said=said, numbers=numbers, black_box=True)


def _asked(toml: Path, plan: PublicPlan, *, round_number: int, kind: str = messages.TRAIN) -> RecordDict:
    with same_global_seeds():
        return site.ask(toml, plan, kind=kind, round_number=round_number)


def _event(charge: Charge) -> tuple[float, float, int]:
    """(sampling rate, noise multiplier, steps); nothing is charged where there is no event."""
    event = charge.event
    return (1.0, float("inf"), 0) if event is None else (
        event.sampling_rate, event.noise_multiplier, event.steps
    )  # fmt: skip


def _steps_seen(sums: Vector, charges: Sequence[Charge]) -> tuple[float, float]:
    """Probability of the updates' variance under the charge, and the noisy steps that it speaks of.

    In full batches at weights that stay, the patients' part is the same in every round.
    """
    _, noise_multiplier, steps = _event(charges[0])
    rest, freedom = (sums - sums.mean(axis=0)).ravel(), (len(sums) - 1) * sums.shape[1]
    stddev = noise_multiplier * CLIP * np.sqrt(steps)
    seen = float(np.sum(rest**2) / freedom / (noise_multiplier * CLIP) ** 2)
    return variance_p_value(rest, stddev=stddev, freedom=freedom), seen


def _cheaper_than_done(
    answers: Sequence[RecordDict], charges: Sequence[Charge], *, rate: float, steps: int
) -> list[str]:
    """What ledger or answers say is less than what was asked for and done."""
    wrong = []
    events = [_event(charge) for charge in charges]
    if any(event[0] < rate for event in events):
        wrong.append(f"charged for sampling rate {min(e[0] for e in events):g}, done {rate:g}")
    if any(event[2] < steps for event in events):
        wrong.append(f"charged for {min(e[2] for e in events)} steps, done {steps}")
    for done in (1, len(answers)):
        cost = recomputed_epsilon(
            sampling_rate=rate,
            noise_multiplier=min(event[1] for event in events),
            steps=steps * done,
            delta=charges[0].delta,
        )
        stated = messages.metrics_of(answers[done - 1])[messages.EPSILON]
        for who, claim in (("answer", stated), ("ledger", charges[done - 1].epsilon or 0.0)):
            if not claim * _CLOSE >= cost:
                wrong.append(f"after {done} the {who} claims epsilon {claim:.3g}, the cost is {cost:.3g}")
    return wrong


def _compared_hospitals(folder: Path, *, side: int) -> tuple[list[str], float]:
    """Two hospitals that differ in one patient: scalars of answers that tell, and a p-value of their noise.

    In full batches at weights that stay, what differs between a hospital's rounds is noise.
    """
    plan = site.make_public_plan(side=side, sampling_rate=1.0, l2_clip_norm=CLIP)
    stated, noise = [], []
    for name, patients in (("with", site.PATIENTS), ("without", site.PATIENTS - 1)):
        toml = site.make_hospital(folder / name, side=side, patients=patients)
        answers = [_asked(toml, plan, round_number=n) for n in (1, 2)]
        stated.append(dict(answers[0][messages.METRICS]))
        noise.append(site.summed_update(answers[0], plan) - site.summed_update(answers[1], plan))
    clock = {messages.TRAINING_STARTED, messages.TRAINING_ENDED}
    telling = {key for key in stated[0] | stated[1] if stated[0].get(key) != stated[1].get(key)} - clock
    told = [f"{name} depends on a single patient" for name in sorted(telling)]
    return told, correlation_p_value(noise[0], noise[1])
