"""The checks that mutants are tried against, cheap ones first; sizes are such that each takes seconds.

Each runs the production code as it is at that moment, and none reads a source file.
"""

from collections.abc import Callable

import numpy as np
import torch

from client.self_test import start as self_test
from client.self_test.setup import Setup
from common.examples import Examples
from common.privacy.plan import PrivacyPlan
from simulations.audits import accounting, arithmetic, canary, neighbours, noise, repeated_rounds, sampling
from simulations.audits.finding import Finding
from tests.audit import hospital_checks as hospital
from tests.client.small_hospital import make_plan

Check = Callable[[str], Finding]
"""Takes the name of the mutant that is in (for processes of its own), empty for none."""


def check_self_test(_: str) -> Finding:
    """The start-up self-test of a hospital, on a run's own parts."""
    plan = make_plan(model={"name": "cnn1"}, data={"image-size": 14})
    units = np.repeat(np.arange(12), 2)
    rng = np.random.default_rng(1)
    examples = Examples(
        inputs={"image": rng.integers(0, 256, (24, 1, 14, 14), dtype=np.uint8)},
        targets=units % 2,
        units=units,
        unit_ids=tuple(str(unit) for unit in range(12)),
    )
    knobs = plan.privacy
    privacy = PrivacyPlan(
        sampling_rate=knobs.sampling_rate,
        l2_clip_norm=knobs.l2_clip_norm,
        noise_multiplier=1.3,
        steps=knobs.local_steps,
        enrolled_units=12,
        max_rows_per_unit=knobs.max_images_per_patient,
        unit="patient",
    )
    setup = Setup(plan=plan, privacy=privacy, examples=examples, device=torch.device("cpu"))
    red = [check for check in self_test.run_checks(setup) if not check.passed]
    said = (
        "; ".join(f"{check.name}: {check.reason}" for check in red) or "all checks of the self-test are green"
    )
    return Finding(audit="self-test", passed=not red, said=said)


def _of(audit: Callable[..., Finding], **sizes) -> Check:
    return lambda _: audit(**sizes)


CHECKS: dict[str, Check] = {
    # from outside: updates, answers, the ledger that the hospital shows
    "grid": _of(arithmetic.audit_grid_black_box),
    "interrupted-round": _of(arithmetic.audit_interrupted_round),
    "noise": _of(noise.audit_noise_black_box),
    "repeated-noise": _of(repeated_rounds.audit_repeated_noise),
    "repeated-draws": _of(repeated_rounds.audit_repeated_draws),
    "neighbours": _of(neighbours.audit_neighbours_black_box),
    "neighbours-large-clip": _of(
        neighbours.audit_neighbours_black_box, models=("softmax",), clips=(3.0,), chunks=(256,)
    ),
    "slow-training": _of(arithmetic.audit_slow_training),
    "sampling": _of(sampling.audit_sampling_black_box, rounds=600, long_rounds=60),
    "asked-twice": lambda _: hospital.check_asked_twice(),
    "several-runs": lambda _: hospital.check_several_runs(),
    "greedy-server": lambda _: hospital.check_greedy_server(),
    "accounting": _of(accounting.audit_accounting),
    "charged-counts": _of(accounting.audit_charged_counts),
    "older-ledger": lambda _: hospital.check_older_ledger(),
    "killed-round": hospital.check_killed_round,
    # from inside
    "self-test": check_self_test,
    "neighbours-inside": _of(neighbours.audit_neighbours, models=("softmax", "cnn-small")),
    "noise-inside": _of(noise.audit_noise),
    "sampling-inside": _of(sampling.audit_sampling, steps=2000, rounds=400),
    "canary": _of(canary.audit_canary, runs=400),
}
