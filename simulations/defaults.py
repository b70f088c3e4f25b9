"""Settings for the data at hand, where nobody asked for others; under privacy they depend on epsilon only.

Chosen by the validation split of PneumoniaMNIST (5 hospitals, `cnn-small`, epsilon 1, 3, 8);
`docs/defaults.md` has the runs, and says what of the test split was seen.
"""

import math

from common.models.names import MODELS

DEFAULT_MODEL = "cnn-small"
SCATTERING = "scattering"
_SAMPLING_RATE = 0.5
_BATCH_SIZE = 64
_EPOCHS = 25


def recommended(
    *, private: bool, model: str, units_per_hospital: int, epsilon: float, visits: bool = False
) -> list[str]:
    """Overrides `section.key=value` for a run; flags and `--set` come after them."""
    if visits:  # a patient has one series, so no room is kept for others of theirs
        advised = recommended(
            private=private, model=model, units_per_hospital=units_per_hospital, epsilon=epsilon
        )
        return [*advised, "privacy.max-images-per-patient=1"]
    if model == SCATTERING:
        return [*_scattering(epsilon if private else math.inf), *MODELS[model].settings]
    if private:
        return [*_with_privacy(epsilon), *(MODELS[model].settings if _is_series(model) else ())]
    return _without_privacy(model, units_per_hospital)


def _with_privacy(epsilon: float) -> list[str]:
    """Half of the patients in each of few steps: large batches make the most of the noise.

    A larger budget pays for more and larger steps. Server momentum and the moving average take noise out.
    """
    rounds, learning_rate = (90, 0.2) if epsilon < 2 else (90, 0.3) if epsilon < 5 else (120, 0.3)
    return [
        f"federation.rounds={rounds}",
        f"privacy.sampling-rate={_SAMPLING_RATE}",
        "privacy.l2-clip-norm=1.0",
        "privacy.local-steps=1",
        "model.activation=tanh",
        "training.optimizer=sgd",
        f"training.learning-rate={learning_rate}",
        "server.optimizer=momentum",
        "server.momentum=0.9",
        "server.ema-decay=0.9",
        "server.final-model=ema",
    ]


def _scattering(epsilon: float) -> list[str]:
    """A larger budget pays for more rounds. Batches, without privacy, are as with it: everybody."""
    rounds = 100 if epsilon < 2 else 200 if epsilon < 5 else 300
    return [f"federation.rounds={rounds}", "training.batch-size=1000000"]


def _without_privacy(model: str, units_per_hospital: int) -> list[str]:
    """One pass over a hospital's images in a round."""
    return [
        f"federation.rounds={_EPOCHS}",
        f"privacy.local-steps={max(1, math.ceil(units_per_hospital / _BATCH_SIZE))}",
        "model.activation=relu",
        "training.optimizer=adam",
        f"training.learning-rate={0.001 if _is_deep(model) else 0.002}",
        "training.learning-rate-schedule=cosine",
        f"training.batch-size={_BATCH_SIZE}",
    ]


def _is_deep(model: str) -> bool:
    return model in MODELS and MODELS[model].deep


def _is_series(model: str) -> bool:
    return model in MODELS and MODELS[model].series
