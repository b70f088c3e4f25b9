"""A private federation computed in one process: the same mechanism as a run's, in a fraction of the time.

python -m simulations.one_process --data pneumoniamnist.npz --epsilon 3 --seeds 0,1,2 \
    --set augmentation.flip=horizontal --set augmentation.shift=0.1 >> levers.jsonl

For trying settings out (docs/accuracy.md): one line of JSON for each seed, with the scores of the last model
and of its moving averages. No federation ran, so nothing here claims privacy.

Why it is the same: with one SGD step in each round the mean of the hospitals' updates, weighted by patients,
is minus l times (sum of all their clipped sums + noise of standard deviation C sqrt(sum of sigma_k^2)) over
q times the sum of their counts. So one table with all patients, one step and that noise give the server the
same update in law. What is left out: rounding on the wire, hospitals that fail, evaluation.
"""

import argparse
import json
import math
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from client.training.augmentation import augment_of_step
from client.training.copies import copies_of, loaded
from client.training.private import private_steps, rows_of_step
from common.config import FederationConfig
from common.errors import ConfigError
from common.examples import Examples
from common.metrics import classification_metrics
from common.models.registry import build_model, initial_parameters, load_parameters, read_parameters
from common.parameters import Parameters, difference
from common.preprocessing import Preprocessing
from common.privacy.calibration import solve_noise_multiplier
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource, SecureRandomness
from common.schedule import learning_rate
from common.scoring import image_probabilities
from common.tasks import Task, task_of
from server.server_optimizer import OptimizerState, moving_average, next_weights
from simulations.preparation import Prepared, prepare
from simulations.scenario import make_scenario
from simulations.ways import merged

EMA_DECAYS = (0.9, 0.95, 0.98)
"""Moving averages that are scored beside the last model; they cost nothing."""


@dataclass(frozen=True, kw_only=True)
class Together:
    """All hospitals' patients as one table, and one plan whose step is the federation's round."""

    config: FederationConfig
    task: Task
    examples: Examples
    plan: PrivacyPlan

    @property
    def preprocessing(self) -> Preprocessing:
        """What is done to the images."""
        return Preprocessing.of(self.config)


def noise_together(config: FederationConfig, counts: Sequence[int], *, epsilon: float) -> float:
    """Noise multiplier of the sum over hospitals of these enrolled counts, each at epsilon by itself.

    Delta is 1 / (10 n) of each. Raises ConfigError where a round is not one weighted sum of clipped sums.
    """
    if config.privacy.local_steps != 1 or config.training.optimizer != "sgd" or config.training.momentum:
        raise ConfigError(
            "these settings are not one plain SGD step in each round",
            why="only then is a round one noised sum over all hospitals' patients",
            fix="run them with flower-simulate run",
        )
    if config.server.weighting != "patients":
        raise ConfigError("only the weighting by patients is one sum", fix="run it with flower-simulate run")
    noise = partial(
        solve_noise_multiplier,
        histories=[],
        sampling_rate=config.privacy.sampling_rate,
        steps=config.federation.rounds,
        epsilon=epsilon,
    )
    return math.hypot(*(noise(delta=1 / (10 * count)) for count in counts))


def rounds_together(together: Together, *, randomness: RandomnessSource) -> Iterator[Parameters]:
    """Yield the global model after every round, as the server would form it."""
    config, plan = together.config, together.plan
    training, rounds, device = config.training, config.federation.rounds, torch.device("cpu")
    model = build_model(config.model_spec)
    weights = initial_parameters(config.model_spec, seed=config.federation.seed)
    load_parameters(model, weights)
    state, preprocessing = OptimizerState(), together.preprocessing
    with private_steps(
        model.train(),
        together.task,
        plan=plan,
        training=training,
        round_number=1,
        num_rounds=rounds,
        input_shape=tuple(together.examples.inputs["image"].shape[1:]),
        randomness=randomness,
    ) as steps:
        for number in range(1, rounds + 1):
            rate = learning_rate(training, round_number=number, num_rounds=rounds)
            for group in steps.optimizer.original_optimizer.param_groups:
                group["lr"] = rate
            stream = randomness.stream(purpose="sampling", round_number=number, step=0)
            rows, segments = rows_of_step(together.examples, plan, stream)
            augment = augment_of_step(
                config.augmentation, preprocessing, randomness, round_number=number, step=0
            )
            each = training.augmentations
            load = partial(loaded, together.examples, preprocessing, device, augment, each)
            steps.clip(*copies_of(rows, segments, each=each), load=load)
            steps.update()
            update = difference(read_parameters(model), weights)
            weights, state = next_weights(weights, update, state, config.server)
            load_parameters(model, weights)
            yield weights


def scores_of(together: Together, weights: Parameters, prepared: Prepared) -> dict[str, Any]:
    """AUC and accuracy on each held-back split."""
    model = build_model(together.config.model_spec).eval()
    load_parameters(model, weights)
    scores = {}
    for name, held in prepared.held_back.sets.items():
        said = image_probabilities(model, together.task, held.images, preprocessing=together.preprocessing)
        found = classification_metrics(said, held.targets)
        scores[name] = {key: found[key] for key in ("auc", "accuracy")}
    return scores


def tried(flags: dict[str, Any]) -> dict[str, Any]:
    """Train and score one federation; `flags` as of `flower-simulate run`. Raises ConfigError, DataError."""
    with tempfile.TemporaryDirectory() as folder:
        prepared = prepare(make_scenario(flags | {"out": str(Path(folder) / "run")}))
        config = prepared.config
        counts = [hospital.enrolled_patients for hospital in prepared.hospitals]
        noise = noise_together(config, counts, epsilon=flags["epsilon"])
        privacy = config.privacy
        plan = PrivacyPlan(
            sampling_rate=privacy.sampling_rate,
            l2_clip_norm=privacy.l2_clip_norm,
            noise_multiplier=noise,
            steps=config.federation.rounds,
            enrolled_units=sum(counts),
            max_rows_per_unit=privacy.max_images_per_patient,
            unit=config.data.unit,
            clipping=privacy.clipping,
        )
        together = Together(config=config, task=task_of(config), examples=merged(prepared), plan=plan)
    # 1. Every round, and the moving averages of all of them.
    weights = initial_parameters(config.model_spec, seed=config.federation.seed)
    averages = dict.fromkeys(EMA_DECAYS, weights)
    for number, weights in enumerate(rounds_together(together, randomness=SecureRandomness()), start=1):
        for decay, average in averages.items():
            averages[decay] = moving_average(average, weights, decay=decay, round_number=number)
    # 2. What they score.
    models = {"last": weights} | {f"ema {decay}": average for decay, average in averages.items()}
    return {
        **flags,
        "noise multiplier of the sum": noise,
        "scores": {name: scores_of(together, found, prepared) for name, found in models.items()},
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """One line of JSON for each seed; exit code 2 for settings that cannot be used."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", default=None, help="as of flower-simulate run; without it phantoms")
    parser.add_argument("--hospitals", type=int, default=5)
    parser.add_argument("--epsilon", type=float, default=3.0)
    parser.add_argument("--model", default=None)
    parser.add_argument("--image-size", type=int, default=None)
    parser.add_argument("--rounds", type=int, default=None)
    parser.add_argument("--partition", default=None)
    parser.add_argument("--seeds", default="0", help="numbers with commas between")
    parser.add_argument("--set", action="append", default=[], help="section.key=value; may be repeated")
    flags = vars(parser.parse_args(arguments))
    torch.set_num_threads(1)
    for seed in flags.pop("seeds").split(","):
        given = {key: value for key, value in flags.items() if value is not None}
        try:
            line = tried(given | {"seed": int(seed), "set": tuple(flags["set"])})
        except ConfigError as error:
            sys.stderr.write(f"{error}\n")
            return 2
        sys.stdout.write(json.dumps(line) + "\n")
        sys.stdout.flush()
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
