"""The server reckons with the step size that hospitals train with."""

import pytest

from client.training import plain
from common.config import TrainingConfig
from common.schedule import learning_rate


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_both_sides_have_the_same_step_size(schedule):
    training = TrainingConfig(learning_rate=0.7, learning_rate_schedule=schedule)
    for number in (1, 2, 9, 10):
        assert learning_rate(training, round_number=number, num_rounds=10) == plain.learning_rate(
            training, round_number=number, num_rounds=10
        )
    with pytest.raises(ValueError, match="round_number"):
        learning_rate(training, round_number=11, num_rounds=10)
