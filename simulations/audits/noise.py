"""Noise audits: the noise that leaves has the variance that is charged for, in every number, always fresh.

White-box: the release of each step times the divisor, minus what the optimiser held. Black-box: updates of
hospitals whose films are black, so that their gradient is zero, and differences of updates of the same films.
All global generators are seeded alike for every hospital and round: noise from one of them would come again.
"""

from itertools import combinations, product

import numpy as np
from scipy import stats

from common.config import ModelSpec
from common.examples import Examples
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from simulations.audits.chance import (
    Vector,
    correlation_p_value,
    least,
    smallest_visible_deviation,
    suspicious,
    two_sided,
    variance_p_value,
)
from simulations.audits.finding import Finding
from simulations.audits.probe import (
    black_films,
    blank_network,
    make_plan,
    noisy_sums,
    same_global_seeds,
    table,
)
from simulations.audits.released_steps import Step, watched_steps

SPEC = ModelSpec(name="cnn-flatten", channels=1, image_size=8, num_outputs=2)
SIGMA = 1.3
_LAGS = (1, 2, 3, 7, 64, 1 << 12, 1 << 16)
_LARGE, _LAGS_OF_LARGE = 512, tuple(1 << power for power in range(10, 19))
"""Side of films whose network has half a million weights: their noise may be drawn in pieces."""


def audit_noise(*, hospitals: int = 2, rounds: int = 2, steps: int = 4) -> Finding:
    """White-box: the noise of every step of several rounds in several hospitals."""
    plan = make_plan(
        sampling_rate=0.4, l2_clip_norm=0.7, noise_multiplier=SIGMA, steps=steps, enrolled_units=40
    )
    stated = SIGMA * 0.7
    seen = [
        step
        for hospital, number in product(range(hospitals), range(1, rounds + 1))
        for step in _watched_round(plan, hospital=hospital, round_number=number)
    ]
    noise = np.concatenate([step.noise for step in seen])
    different = len(np.unique(noise)) / len(noise)
    p_values = _white_box_p_values(seen, stated)
    return _judged(
        "noise", p_values, noise / stated, {"share of different numbers": different}, repeats=different < 0.9
    )


def audit_noise_black_box(*, rounds: int = 4, side: int = 64, steps: int = 3) -> Finding:
    """Black-box: what updates of one and of several steps vary by, and whether any two are alike."""
    stated, p_values = SIGMA * 0.05, {}
    single = make_plan(noise_multiplier=SIGMA)
    several = make_plan(noise_multiplier=SIGMA, steps=steps)

    def update(plan: PrivacyPlan, examples: Examples, number: int) -> Vector:
        with same_global_seeds():
            model = blank_network(examples.inputs["image"].shape[-1])
            return noisy_sums(model=model, examples=examples, plan=plan, round_number=number)

    numbers = range(1, rounds + 1)
    # Two hospitals without a gradient: their updates are noise.
    alone = [update(single, black_films(5, side), number) for _, number in product("ab", numbers)]
    added = [update(several, black_films(5, side), number) for number in numbers]
    # One with patients: what is the same in all its full-batch rounds is theirs, the rest is noise.
    films = _random_films(6, side)
    same = np.stack([update(single, films, number) for number in numbers])
    rest = (same - same.mean(axis=0)).ravel()
    flat = np.concatenate(alone)
    p_values["variance of one step"] = variance_p_value(flat, stddev=stated)
    p_values[f"variance of {steps} steps"] = variance_p_value(
        np.concatenate(added), stddev=stated * np.sqrt(steps)
    )
    p_values["variance beside patients"] = variance_p_value(
        rest, stddev=stated, freedom=(rounds - 1) * same.shape[1]
    )
    p_values["mean"] = two_sided(float(flat.mean()) * np.sqrt(len(flat)) / stated)
    p_values["shape"] = float(stats.kstest(flat / stated, "norm").pvalue)
    every = [*alone, *added, *np.diff(same, axis=0)[::2]]
    p_values["no noise twice"] = least([correlation_p_value(a, b) for a, b in combinations(every, 2)])
    p_values["no period"] = least(
        [correlation_p_value(v[:-lag], v[lag:]) for v, lag in product(alone, _LAGS) if lag < len(v) // 2]
    )
    large = update(single, black_films(1, _LARGE), 1)
    p_values["no period in a large parameter"] = least(
        [correlation_p_value(large[:-lag], large[lag:]) for lag in _LAGS_OF_LARGE]
    )
    p_values["variance of a large parameter"] = variance_p_value(large, stddev=stated)
    over = np.std(np.concatenate(added)) / (stated * np.sqrt(steps))
    extra = {f"measured over stated standard deviation, {steps} steps": float(over)}
    return _judged("noise, black box", p_values, flat / stated, extra, black_box=True)


def _watched_round(plan: PrivacyPlan, *, hospital: int, round_number: int) -> list[Step]:
    model = build_model(SPEC)
    load_parameters(model, initial_parameters(SPEC, seed=2))
    films = _random_films(30, SPEC.image_size, seed=hospital, rows=(1, 3, 2, 1, 4, 2))
    with same_global_seeds(), watched_steps() as steps:
        noisy_sums(
            model=model,
            examples=films,
            plan=plan,
            learning_rate=0.01,
            preprocessing=Preprocessing(image_size=SPEC.image_size, channels=1),
            round_number=round_number,
        )
    return steps


def _random_films(patients: int, side: int, *, seed: int = 0, rows: tuple[int, ...] = (1,)) -> Examples:
    rng = np.random.default_rng(seed)
    units = np.repeat(np.arange(patients), np.resize(rows, patients))
    images = rng.integers(0, 256, (len(units), 1, side, side), dtype=np.uint8)
    return table(images, rng.integers(0, 2, len(units)), units)


def _white_box_p_values(steps: list[Step], stated: float) -> dict[str, float]:
    each = [step.noise for step in steps]
    noise = np.concatenate(each)
    by_parameter = [
        np.concatenate(parts) for parts in zip(*(s.noise_by_parameter for s in steps), strict=True)
    ]
    pairs = [correlation_p_value(first, second) for first, second in combinations(each, 2)]
    # The same keystream from its start in each parameter would show up between parameters of one step.
    for step in steps:
        for first, second in combinations(step.noise_by_parameter, 2):
            if (length := min(len(first), len(second))) >= 32:
                pairs.append(correlation_p_value(first[:length], second[:length]))
    # And a keystream with a short period, between a step and itself.
    pairs += [correlation_p_value(v[:-lag], v[lag:]) for v, lag in product(each, _LAGS)]
    scaled = noise / stated
    beyond = len(noise) * 2 * stats.norm.sf(4)
    return {
        "variance": variance_p_value(noise, stddev=stated),
        "mean": two_sided(float(scaled.mean()) * np.sqrt(len(noise))),
        "shape": float(stats.kstest(scaled, "norm").pvalue),
        "kurtosis": two_sided(float(np.mean(scaled**4) - 3) / np.sqrt(96 / len(noise))),
        "tails": two_sided(float(np.sum(np.abs(scaled) > 4) - beyond) / np.sqrt(beyond)),
        "each parameter": least([variance_p_value(part, stddev=stated) for part in by_parameter]),
        "no noise twice": least(pairs),
        "nothing of the patients": least(
            [correlation_p_value(s.noise, s.clipped_sum) for s in steps if s.clipped_sum.any()] or [1.0]
        ),
    }


def _judged(
    audit: str,
    p_values: dict[str, float],
    scaled: Vector,
    extra: dict[str, float],
    *,
    repeats: bool = False,
    black_box: bool = False,
) -> Finding:
    wrong = suspicious(p_values) + ["numbers that come again"] * repeats
    visible = 100 * smallest_visible_deviation(len(scaled))
    said = (
        f"{len(scaled):,} numbers of noise have the stated variance and nothing in common; "
        f"a sigma off by {visible:.2g} % would be seen."
    )
    if wrong:
        said = f"The noise is not what is charged for: {', '.join(wrong)}."
    return Finding(
        audit=audit,
        passed=not wrong,
        said=said,
        numbers={
            "numbers": len(scaled),
            "measured over stated standard deviation": float(np.sqrt(np.mean(scaled**2))),
            "deviation of sigma that would be seen, %": visible,
            **{f"p, {name}": p for name, p in p_values.items()},
            **extra,
        },
        black_box=black_box,
    )
