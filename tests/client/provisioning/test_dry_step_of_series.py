"""What `flower-client check` and `plan` measure for a study of series: a step on the longest ones."""

import torch

from client.provisioning.dry_step import _random_examples, dry_step_seconds
from common.config import PublicPlan
from common.series import lengths, row_shape
from common.settings import parse

PLAN = {
    "data": {"series": "visits", "steps": 3, "image-size": 17, "task": "progression"},
    "model": {"name": "rnn"},
    "privacy": {"max-images-per-patient": 1},
}


def test_a_step_on_series_takes_time_and_no_patient():
    plan = parse(PublicPlan, PLAN, source="test")
    examples = _random_examples(plan, units=5)
    assert row_shape(examples.inputs) == plan.data.input_shape == (3, 17 * 17 + 2)
    assert lengths(examples.inputs).tolist() == [3] * 5
    assert dry_step_seconds(plan, enrolled_patients=8, device=torch.device("cpu")) > 0
