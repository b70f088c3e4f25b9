"""Audit C: an attacker who sees every noisy gradient cannot tell whether a patient was there any better than
the accountant says.

The patient's film lights one pixel that is dark in all others, so that the clipped gradient has norm C in a
direction that nobody else touches: the worst case of the mechanism. Two worlds, with and without the patient,
through `train_privately`; what is released in that direction decides. Bounds hold with probability 0.999
each whatever the distribution (Clopper-Pearson, thresholds fixed beforehand or on other runs). A bound above
the claim proves a defect; one below proves nothing, and so defects are planted to see that it does rise.
Source: Nasr et al., Tight Auditing of Differentially Private Machine Learning, arXiv 2302.07956.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from scipy import optimize, stats
from torch import nn

import client.private_training
from client.private_training import train_privately
from common.config import TrainingConfig
from common.examples import Examples
from common.preprocessing import Preprocessing
from common.privacy.accountant import epsilon
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import SecureRandomness
from tests.audit.released_steps import watched_steps
from tests.client.dp_oracle import TASK, make_plan

pytestmark = pytest.mark.audit

SIDE, DARK = 4, 13
"""The films are 4 x 4; pixel 13 is dark in all but the canary's."""
CLIP = 0.05
OTHERS = 6
CONFIDENCE = 0.999


class FromBlack(Preprocessing):
    """Black is 0, so that a dark pixel has no gradient."""

    def standardise(self, images):
        return images.astype(np.float32) / 255


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A mechanism and what is claimed for `steps_per_run` of its steps."""

    sampling_rate: float
    noise_multiplier: float
    steps_per_run: int
    delta: float

    def plan(self, runs):
        return make_plan(
            sampling_rate=self.sampling_rate,
            noise_multiplier=self.noise_multiplier,
            l2_clip_norm=CLIP,
            steps=runs * self.steps_per_run,
            enrolled_units=10,
        )

    def epsilon(self):
        return epsilon([self.plan(1).event()], delta=self.delta)


FULL_BATCH = Claim(sampling_rate=1.0, noise_multiplier=3.0, steps_per_run=4, delta=1e-5)
SAMPLED = Claim(sampling_rate=0.2, noise_multiplier=1.0, steps_per_run=5, delta=1e-2)


def films(*, with_canary):
    rng = np.random.default_rng(2)
    images = rng.integers(1, 256, (OTHERS + 1, 1, SIDE, SIDE), dtype=np.uint8)
    images.reshape(OTHERS + 1, -1)[:, DARK] = 0
    images[-1] = 0
    images[-1].flat[DARK] = 255
    everybody = Examples(
        inputs={"image": images},
        targets=np.arange(OTHERS + 1) % 2,
        units=np.arange(OTHERS + 1),
        unit_ids=tuple(str(number) for number in range(OTHERS + 1)),
    )
    return everybody if with_canary else everybody.select_units(np.arange(OTHERS))


def canary_direction():
    """The canary's gradient over its norm, in the order of the weights (2, pixels): of its cross-entropy."""
    direction = np.zeros((2, SIDE**2))
    direction[:, DARK] = np.array([-1, 1]) / np.sqrt(2)  # its class is 0: OTHERS is even
    return direction.ravel()


def observations(claim, *, with_canary, runs):
    """(runs, steps_per_run): what is released in the canary's direction, in units of C.

    Without a step that moves the weights, all steps are runs of the same experiment.
    """
    direction = canary_direction()
    model = nn.Sequential(nn.Flatten(), nn.Linear(SIDE**2, 2, bias=False))
    nn.init.zeros_(model[1].weight)
    with watched_steps() as steps:
        train_privately(
            model=model,
            task=TASK,
            examples=films(with_canary=with_canary),
            preprocessing=FromBlack(image_size=SIDE, channels=1),
            plan=claim.plan(runs),
            training=TrainingConfig(learning_rate=1e-9),
            round_number=1,
            num_rounds=1,
            randomness=SecureRandomness(),
            device=torch.device("cpu"),
        )
    unnoised = np.array([direction @ step.clipped_sum for step in steps]) / CLIP
    assert not with_canary or unnoised.max() > 0.999, "the canary's gradient fills the clip"
    assert with_canary or not unnoised.any(), "nobody else touches its direction"
    seen = np.array([direction @ step.release * step.divisor for step in steps]) / CLIP
    return seen.reshape(runs, claim.steps_per_run)


def at_most(hits, trials):
    """Clopper-Pearson upper bound of a probability."""
    return 1.0 if hits == trials else float(stats.beta.ppf(CONFIDENCE, hits + 1, trials - hits))


def error_bounds(scores_in, scores_out, threshold):
    """Upper bounds of the attacker's two errors: taking without for with, and with for without."""
    return (
        at_most(int(np.sum(scores_out > threshold)), len(scores_out)),
        at_most(int(np.sum(scores_in <= threshold)), len(scores_in)),
    )


def mu_lower_bound(claim, *, runs):
    """Lower bound of mu if the mechanism is mu-GDP, from the sum of a run's steps (full batch)."""
    scale = claim.noise_multiplier * np.sqrt(claim.steps_per_run)
    scores_in, scores_out = (
        observations(claim, with_canary=there, runs=runs).sum(axis=1) / scale for there in (True, False)
    )
    threshold = np.sqrt(claim.steps_per_run) / claim.noise_multiplier / 2
    false_positives, false_negatives = error_bounds(scores_in, scores_out, threshold)
    return stats.norm.isf(false_positives) - stats.norm.ppf(false_negatives)


def gaussian_epsilon(mu, delta):
    """Epsilon of mu-GDP at `delta` (Dong et al., arXiv 1905.02383, corollary 2.13)."""

    def excess(eps):
        return stats.norm.cdf(-eps / mu + mu / 2) - np.exp(eps) * stats.norm.cdf(-eps / mu - mu / 2) - delta

    return 0.0 if mu <= 0 or excess(0.0) <= 0 else float(optimize.brentq(excess, 0.0, 200.0))


def epsilon_lower_bound(claim, *, runs):
    """Lower bound of epsilon at the claim's delta by the likelihood ratio of a run; no assumption on shapes.

    The threshold is the best one on the first half of the runs and is judged on the second.
    """
    q, variance = claim.sampling_rate, claim.noise_multiplier**2

    def scores(there):
        seen = observations(claim, with_canary=there, runs=runs)
        return np.log1p(q * np.expm1((seen - 0.5) / variance)).sum(axis=1)

    scores_in, scores_out = scores(True), scores(False)
    half = runs // 2

    def bound(part, threshold):
        false_positives, false_negatives = error_bounds(scores_in[part], scores_out[part], threshold)
        return np.log(max(1 - claim.delta - false_negatives, 1e-12) / false_positives)

    thresholds = np.quantile(np.concatenate([scores_in[:half], scores_out[:half]]), np.linspace(0, 1, 200))
    best = max(thresholds, key=lambda threshold: bound(slice(0, half), threshold))
    return float(bound(slice(half, None), best))


def test_full_batch_steps_leak_no_more_than_claimed_and_the_audit_is_tight(found):
    mu = np.sqrt(FULL_BATCH.steps_per_run) / FULL_BATCH.noise_multiplier
    bound = mu_lower_bound(FULL_BATCH, runs=2500)
    found("claimed epsilon", FULL_BATCH.epsilon())
    found("audited epsilon, lower bound", gaussian_epsilon(bound, FULL_BATCH.delta))
    found("mu of theory", mu)
    found("audited mu, lower bound", bound)
    assert gaussian_epsilon(mu, FULL_BATCH.delta) == pytest.approx(FULL_BATCH.epsilon(), rel=0.01)
    assert gaussian_epsilon(bound, FULL_BATCH.delta) <= FULL_BATCH.epsilon()
    assert bound > 0.5 * mu


def test_sampled_steps_leak_no_more_than_claimed(found):
    bound = epsilon_lower_bound(SAMPLED, runs=2000)
    found("claimed epsilon", SAMPLED.epsilon())
    found("audited epsilon, lower bound", bound)
    assert 0 < bound <= SAMPLED.epsilon()


# --- an audit that can fail ---


def quarter_the_noise(monkeypatch):
    real = PrivacyPlan.noise_stddev.fget
    monkeypatch.setattr(PrivacyPlan, "noise_stddev", property(lambda plan: real(plan) / 4))


def test_a_quarter_of_the_noise_exceeds_the_claim_in_full_batches(monkeypatch, found):
    quarter_the_noise(monkeypatch)
    bound = gaussian_epsilon(mu_lower_bound(FULL_BATCH, runs=800), FULL_BATCH.delta)
    found("claimed epsilon", FULL_BATCH.epsilon())
    found("audited epsilon, lower bound", bound)
    assert bound > FULL_BATCH.epsilon()


def test_a_quarter_of_the_noise_exceeds_the_claim_in_sampled_steps(monkeypatch, found):
    quarter_the_noise(monkeypatch)
    bound = epsilon_lower_bound(SAMPLED, runs=2500)
    found("claimed epsilon", SAMPLED.epsilon())
    found("audited epsilon, lower bound", bound)
    assert bound > SAMPLED.epsilon()


def test_everybody_entering_every_step_exceeds_the_claim(monkeypatch, found):
    monkeypatch.setattr(client.private_training, "poisson_sample", lambda n, rate, stream: np.arange(n))
    bound = epsilon_lower_bound(SAMPLED, runs=2500)
    found("claimed epsilon", SAMPLED.epsilon())
    found("audited epsilon, lower bound", bound)
    assert bound > SAMPLED.epsilon()


def test_a_patient_counted_twice_exceeds_the_claim(monkeypatch, found):
    """Trap T7: what is left of a batch enters the next release as well."""
    real = client.private_training.accumulate_clipped_gradients

    def twice(*arguments, inputs, **others):
        for _ in range(2):
            real(*arguments, inputs=inputs.clone(), **others)

    monkeypatch.setattr(client.private_training, "accumulate_clipped_gradients", twice)
    bound = gaussian_epsilon(mu_lower_bound(FULL_BATCH, runs=1200), FULL_BATCH.delta)
    found("claimed epsilon", FULL_BATCH.epsilon())
    found("audited epsilon, lower bound", bound)
    assert bound > FULL_BATCH.epsilon()
