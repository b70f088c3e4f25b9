"""Audits by repetition: the same films, weights and round, asked for again and again, seeds set alike.

What differs between two such updates is chance and nothing else: noise, which every parameter must have all
of, and who was drawn, which must not be the same twice.
"""

from itertools import combinations

import numpy as np

from common.config import ModelSpec
from common.models import registry
from common.preprocessing import Preprocessing
from simulations.audits import sampling
from simulations.audits.chance import Vector, correlation_p_value, suspicious, variance_p_value
from simulations.audits.finding import Finding
from simulations.audits.probe import CLIP, make_plan, noisy_sums, same_global_seeds, table

SIZE, PATIENTS, SIGMA = 14, 6, 1.3


def audit_repeated_noise(*, models: tuple[str, ...] = ("softmax", "cnn1"), rounds: int = 20) -> Finding:
    """Black-box: in full batches updates of one round differ by the charged noise, in each parameter."""
    p_values: dict[str, float] = {}
    for name in models:
        differences = _differences(name, rounds)
        for parameter, noise in differences.items():
            p_values[f"{parameter} of {name}"] = variance_p_value(
                noise.ravel(), stddev=SIGMA * CLIP * np.sqrt(2)
            )
        for (one, first), (other, second) in combinations(differences.items(), 2):
            shared = min(first.shape[1], second.shape[1])
            p_values[f"{one} with {other} of {name}"] = correlation_p_value(
                first[:, :shared].ravel(), second[:, :shared].ravel()
            )
    wrong = suspicious(p_values)
    said = f"Each parameter has the charged noise, of its own ({len(p_values)} checks)."
    return Finding(
        audit="repeated rounds, noise",
        passed=not wrong,
        said=f"Not the charged noise in {', '.join(wrong)}." if wrong else said,
        numbers={f"p, {name}": p for name, p in p_values.items()},
        black_box=True,
    )


def audit_repeated_draws(*, rounds: int = 60) -> Finding:
    """Black-box: two hospitals, alike in seeds and films, draw different patients in the same rounds."""
    with same_global_seeds():
        first = sampling.participations(rounds=rounds, steps=1)
    with same_global_seeds():
        second = sampling.participations(rounds=rounds, steps=1)
    drawn = [np.where(seen > 0.5, 1.0, 0.0).ravel() - sampling.RATE for seen in (first, second)]
    p_value = correlation_p_value(*drawn)
    wrong = suspicious({"draws": p_value})
    said = f"{first.size} draws in each of two hospitals that are seeded alike have nothing in common."
    return Finding(
        audit="repeated rounds, draws",
        passed=not wrong,
        said="Two hospitals draw the same patients: a seed decides who enters." if wrong else said,
        numbers={"draws": first.size, "p, draws": p_value},
        black_box=True,
    )


def _differences(name: str, rounds: int) -> dict[str, Vector]:
    """By parameter: differences of the sums of two rounds, (pairs of rounds, numbers)."""
    spec = ModelSpec(name=name, channels=1, image_size=SIZE, num_outputs=2)
    rng = np.random.default_rng(3)
    films = table(
        rng.integers(0, 256, (PATIENTS, 1, SIZE, SIZE), dtype=np.uint8),
        np.arange(PATIENTS, dtype=np.int64) % 2,
    )
    start, sums = registry.initial_parameters(spec, 1), []
    for _ in range(rounds):
        model = registry.build_model(spec)
        registry.load_parameters(model, start)
        with same_global_seeds():
            sums.append(
                noisy_sums(
                    model=model,
                    examples=films,
                    plan=make_plan(noise_multiplier=SIGMA),
                    learning_rate=1.0,
                    preprocessing=Preprocessing(image_size=SIZE, channels=1),
                )
            )
    apart = np.stack(sums)[::2] - np.stack(sums)[1::2]
    edges = np.cumsum([weights.size for weights in start.values()])[:-1]
    return dict(zip(start, np.split(apart, edges, axis=1), strict=True))
