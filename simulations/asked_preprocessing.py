"""The preprocessing that a scenario asks for, with the size and channels that its images decide."""

import numpy as np
from numpy.typing import NDArray

from common.config import PublicPlan
from common.errors import ConfigError
from common.preparation.problems import CannotPrepareError
from common.preprocessing import Preprocessing
from common.settings import parse
from simulations.scenario import Scenario


def asked_preprocessing(scenario: Scenario, *, image_size: int, channels: int) -> Preprocessing:
    """With the steps of `--set preprocessing.key=value`. Raises ConfigError."""
    own = {
        "data": {"image-size": image_size, "channels": channels},
        "preprocessing": scenario.overrides.get("preprocessing", {}),
    }
    return Preprocessing.of(parse(PublicPlan, own, source="--set"))


def fitted_phantoms(images: NDArray[np.uint8], preprocessing: Preprocessing) -> NDArray[np.uint8]:
    """Generated images as `Preprocessing.fit_array`. Raises ConfigError where they cannot be prepared so."""
    try:
        return preprocessing.fit_array(images)
    except CannotPrepareError as error:
        raise ConfigError(
            "generated images cannot be prepared so",
            why=f"a phantom of 8 bits is refused: {error.problem}",
            fix="choose other --set preprocessing.key=value, or name --data",
        ) from None
