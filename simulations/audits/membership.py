"""Membership inference: many models, each trained on a random half of the same patients; who was in which.

Labels are tossed, so that a model can only learn them by heart: overfitted on purpose, the worst case. The
same patients, labels, first weights and steps are used without privacy (`client.training.plain.train`) and
under it (`client.training.private.train_privately`). The first shows that the attack works; the second is
judged by its claim. The attack and its bounds: `simulations.audits.likelihood_ratio`.

False alarms: without privacy all is fixed by the seed. Under privacy the bound on epsilon exceeds the claim
with probability below 1e-6 by its theorem, and the limit of the true positive rate what the claim allows with
far less than 1e-3: 0.01 is expected and 0.027 allowed, with a standard error below 0.006.
"""

import io
import time
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch

import client.training.plain
import client.training.private
from client.images.phantoms import CLASSES, hospital_phantoms
from common.config import ModelSpec, TrainingConfig
from common.examples import Examples
from common.files import write_bytes_atomically
from common.models.registry import build_model, initial_parameters, load_parameters
from common.preprocessing import Preprocessing
from common.privacy.accountant import epsilon
from common.privacy.calibration import solve_noise_multiplier
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import ReproducibleRandomness, SecureRandomness
from common.tasks import make_task
from simulations.audits.finding import ALPHA, CLAIMED, CONFIDENCE, EMPIRICAL, Finding
from simulations.audits.likelihood_ratio import (
    FALSE_POSITIVES,
    LIMIT,
    Attack,
    Membership,
    Scores,
    judge,
)

PICTURE = "membership.png"
MODEL, SIDE = "cnn-small", 28
EPSILON, DELTA = 1.0, 1e-10
"""What is claimed. The delta is tiny because the bound pays for it with the number of guesses."""
LEAST_TRUE_POSITIVES = 0.02
"""Twice what guessing gives: below it the attack without privacy does not count as one."""


@dataclass(frozen=True, kw_only=True)
class Setup:
    """Who is trained on, and how; the same for every model."""

    patients: Examples
    """One film each, labels tossed."""
    steps: int
    """Optimiser steps of each model."""
    spec: ModelSpec
    training: TrainingConfig

    @cached_property
    def plan(self) -> PrivacyPlan:
        """Plan of the private models."""
        noise = solve_noise_multiplier(
            histories=[], sampling_rate=0.5, steps=self.steps, epsilon=EPSILON, delta=DELTA
        )
        return PrivacyPlan(
            sampling_rate=0.5,
            l2_clip_norm=1.0,
            noise_multiplier=noise,
            steps=self.steps,
            enrolled_units=self.patients.num_units // 2,
            max_rows_per_unit=1,
            unit="patient",
        )


def audit_membership(*, folder: Path, quick: bool = False, seed: int = 0) -> Finding:
    """Attack overfitted models without and with privacy; draws their ROC curves into `folder`.

    It passes when the models without privacy give their patients away (else the audit could see nothing) and
    those under privacy no more than claimed: neither bound on epsilon above it, nor more true positives than
    e^epsilon times the false ones plus delta.
    """
    started = time.monotonic()
    models, patients, steps = (16, 64, 80) if quick else (20, 100, 150)
    setup = _setup(patients, steps, seed)
    # Fair and independent tosses: the bound on epsilon rests on them.
    member = np.random.default_rng((seed, 1)).random((models, patients)) < 0.5
    open_ = judge(_confidences(setup, member, private=False), member, delta=DELTA, seed=seed)
    private = judge(_confidences(setup, member, private=True), member, delta=DELTA, seed=seed)
    claimed = epsilon([setup.plan.event()], delta=DELTA)
    allowed = float(np.exp(claimed)) * FALSE_POSITIVES + DELTA
    attackable = open_.true_positives_lower > LEAST_TRUE_POSITIVES
    kept = private.epsilon_lower <= claimed and private.true_positives_lower <= allowed
    write_bytes_atomically(folder / PICTURE, _picture(open_, private, member, claimed))
    return Finding(
        audit="membership-inference",
        passed=attackable and kept,
        said=f"At 1 % false positives LiRA finds {open_.true_positives:.0%} of the patients of an overfitted "
        f"model without privacy (at least {open_.true_positives_lower:.0%}) and "
        f"{private.true_positives:.1%} under epsilon {claimed:.2f}, which allows {allowed:.1%}.",
        numbers={
            CLAIMED: claimed,
            EMPIRICAL: private.epsilon_lower,
            CONFIDENCE: 1 - ALPHA,
            "delta": DELTA,
            "true positives at 1 % without privacy": open_.true_positives,
            "true positives at 1 % without privacy, lower limit": open_.true_positives_lower,
            "AUC without privacy": open_.auc,
            "epsilon without privacy, lower bound": open_.epsilon_lower,
            "true positives at 1 % under privacy": private.true_positives,
            "true positives at 1 % under privacy, lower limit": private.true_positives_lower,
            "true positives at 1 % that the claim allows": allowed,
            "AUC under privacy": private.auc,
            "confidence of the lower limits": LIMIT,
            "models of each kind": float(models),
            "patients": float(patients),
        },
        black_box=True,
        wall_s=time.monotonic() - started,
        pictures=(PICTURE,),
    )


def _setup(patients: int, steps: int, seed: int) -> Setup:
    drawn = hospital_phantoms(hospital=0, num_patients=patients, image_size=SIDE, seed=seed)
    first = np.unique(np.asarray(drawn.patients), return_index=True)[1]
    return Setup(
        patients=Examples(
            inputs={"image": drawn.images[first][:, None]},
            targets=np.random.default_rng((seed, 0)).integers(0, len(CLASSES), patients),
            units=np.arange(patients),
            unit_ids=tuple(drawn.patients[row] for row in first),
        ),
        steps=steps,
        spec=ModelSpec(name=MODEL, channels=1, image_size=SIDE, num_outputs=len(CLASSES)),
        training=TrainingConfig(learning_rate=0.1, momentum=0.9, batch_size=patients),
    )


def _confidences(setup: Setup, member: Membership, *, private: bool) -> Scores:
    """Train a model for each row of `member`; how sure it is of each patient's label, as a logit."""
    return np.stack(
        [_confidence(setup, there, number, private=private) for number, there in enumerate(member)]
    )


def _confidence(setup: Setup, there: npt.NDArray[np.bool_], number: int, *, private: bool) -> Scores:
    task, device = make_task("classification", CLASSES), torch.device("cpu")
    preprocessing = Preprocessing(image_size=SIDE, channels=1)
    trained_on = setup.patients.select_units(np.flatnonzero(there))
    model = build_model(setup.spec)
    load_parameters(model, initial_parameters(setup.spec, seed=0))
    if private:
        result = client.training.private.train_privately(
            model=model, task=task, examples=trained_on, preprocessing=preprocessing, plan=setup.plan,
            training=setup.training, round_number=1, num_rounds=1, randomness=SecureRandomness(),
            device=device,
        )  # fmt: skip
    else:
        result = client.training.plain.train(
            model=model, task=task, examples=trained_on, preprocessing=preprocessing,
            local_steps=setup.steps, training=setup.training, round_number=1, num_rounds=1,
            randomness=ReproducibleRandomness(number, "audit"), device=device,
        )  # fmt: skip
    # From here on nothing but what leaves the hospital: the weights.
    load_parameters(model, result.parameters)
    images = torch.from_numpy(preprocessing.standardise(setup.patients.inputs["image"]))
    with torch.no_grad():
        outputs = model(images).double().numpy()
    # With two classes the difference of the outputs is the logit of the confidence.
    rows, labels = np.arange(len(outputs)), setup.patients.targets
    logits: Scores = outputs[rows, labels] - outputs[rows, 1 - labels]
    return np.nan_to_num(logits)


def _picture(open_: Attack, private: Attack, member: Membership, claimed: float) -> bytes:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 5.0), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    lowest = 1 / max(1, int((~member).sum()))
    for attack, name, colour, line in (
        (open_, "without privacy", "#c2571a", "-"),
        (private, f"under epsilon {claimed:.2g}", "#0b6e99", "--"),
    ):
        inside = member.ravel()[np.argsort(-attack.ratios, axis=None, kind="stable")]
        false, true = np.cumsum(~inside) / (~inside).sum(), np.cumsum(inside) / inside.sum()
        axes.plot(false, true, color=colour, linestyle=line, linewidth=1.8,
                  label=f"{name}: {attack.true_positives:.1%} at 1 %, AUC {attack.auc:.2f}")  # fmt: skip
    rates = np.geomspace(lowest, 1, 100)
    axes.plot(rates, np.minimum(1, np.exp(claimed) * rates + DELTA), color="#52606d", linestyle=":",
              label=f"most that epsilon {claimed:.2g} allows")  # fmt: skip
    axes.plot(rates, rates, color="#b0b8c0", linewidth=1, label="guessing")
    axes.axvline(FALSE_POSITIVES, color="#e3e8ed", zorder=0)
    axes.set(xscale="log", yscale="log", xlim=(lowest, 1), ylim=(lowest, 1.1))
    axes.set(xlabel="false positives: said to be in, but out", ylabel="true positives: found members")
    axes.set_title(f"Who was in the training set? LiRA on {len(member)} models each", fontsize=11)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=9, loc="lower right")
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=130, metadata={"Software": None})
    return buffer.getvalue()
