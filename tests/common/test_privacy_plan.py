"""Plan and event: refused when impossible, equal after a round trip, one source of all numbers."""

import json
import math

import pytest

from common.privacy.plan import PrivacyEvent, PrivacyPlan

PLAN = {
    "sampling_rate": 0.5,
    "l2_clip_norm": 2.0,
    "noise_multiplier": 1.5,
    "steps": 3,
    "enrolled_units": 900,
    "max_rows_per_unit": 4,
    "unit": "patient",
}


def test_the_plan_makes_its_own_numbers():
    plan = PrivacyPlan(**PLAN)
    assert plan.expected_batch_size == 450
    assert plan.noise_stddev == 3.0
    assert plan.event() == PrivacyEvent(sampling_rate=0.5, noise_multiplier=1.5, steps=3)


def test_round_trip_and_digest():
    plan = PrivacyPlan(**PLAN)
    again = PrivacyPlan.from_dict(json.loads(json.dumps(plan.to_dict())))
    assert again == plan
    assert again.digest() == plan.digest()
    for name, other in {"steps": 4, "unit": "image", "noise_multiplier": 1.6}.items():
        assert PrivacyPlan(**{**PLAN, name: other}).digest() != plan.digest()
    event = plan.event()
    assert PrivacyEvent.from_dict(json.loads(json.dumps(event.to_dict()))) == event


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling_rate", 0.0),
        ("sampling_rate", 1.1),
        ("sampling_rate", math.nan),
        ("l2_clip_norm", 0.0),
        ("l2_clip_norm", math.inf),
        ("noise_multiplier", 0.0),
        ("noise_multiplier", math.nan),
        ("noise_multiplier", -1.0),
        ("steps", 0),
        ("steps", 1.5),
        ("enrolled_units", 0),
        ("max_rows_per_unit", 0),
        ("unit", "scan"),
    ],
)
def test_impossible_plans_are_refused(name, value):
    with pytest.raises(ValueError, match=name):
        PrivacyPlan(**{**PLAN, name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sampling_rate", 0),
        ("sampling_rate", math.nan),
        ("noise_multiplier", -1),
        ("noise_multiplier", math.inf),
    ]
    + [("steps", -1), ("steps", 0.5)],
)
def test_impossible_events_are_refused(name, value):
    good = {"sampling_rate": 0.5, "noise_multiplier": 1.0, "steps": 1}
    with pytest.raises(ValueError, match=name):
        PrivacyEvent(**{**good, name: value})


def test_unknown_or_missing_fields_are_refused():
    for values in ({**PLAN, "seed": 1}, {k: v for k, v in PLAN.items() if k != "unit"}):
        with pytest.raises(ValueError, match="exactly"):
            PrivacyPlan.from_dict(values)
