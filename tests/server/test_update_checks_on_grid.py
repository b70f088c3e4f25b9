"""Checks on replies in whole numbers: as strict as on float32, with the same codes."""

from dataclasses import replace

import numpy as np
import pytest
from flwr.app import MetricRecord

from common.parameters import l2_norm, to_record
from common.privacy.randomness import ReproducibleRandomness
from common.quantisation import Grid, quantised
from server.update_checks import Defect, Outcome, Question, Rejection, Update, judge_reply, update_norm_bound
from tests.server.fake_federation import TEMPLATE, some_parameters
from tests.server.test_update_checks import HOSPITAL, METRICS, question, reply

GRID = Grid(bits=8, exponents=(-2, -3))


def grid_question(grid=GRID, **plan) -> Question:
    asked = question(**plan)
    return replace(asked, envelope=replace(asked.envelope, encoding="int8-grid"), grid=grid)


def whole_numbers(*, grid=GRID, weight=200, scale=1.0):
    update = {name: scale * array for name, array in some_parameters(3).items()}
    stream = ReproducibleRandomness(0, "a").stream(purpose="rounding", round_number=4, step=0)
    return quantised(update, grid=grid, weight=weight, stream=stream)


def grid_reply(arrays, **metrics):
    content = {"arrays": to_record(arrays), "metrics": MetricRecord(METRICS | metrics)}
    return reply(content, envelope=grid_question().envelope)


def test_a_good_reply_in_whole_numbers_gives_them():
    judged = judge_reply(grid_reply(whole_numbers()), grid_question(), HOSPITAL)
    assert isinstance(judged, Update)
    exact = np.concatenate([200 * some_parameters(3)[name].ravel() for name in sorted(TEMPLATE)])
    spacing = np.repeat([0.25, 0.125], [3, 12])
    assert (np.abs(judged.delta.whole(slice(0, 15)) * spacing - exact) < spacing).all()


@pytest.mark.parametrize(
    ("arrays", "code"),
    [
        (lambda: some_parameters(3), Defect.ARRAYS),
        (lambda: whole_numbers(weight=199), Defect.ARRAYS),
        (lambda: whole_numbers(grid=Grid(bits=8, exponents=(-2, -4))), Defect.ARRAYS),
        (lambda: whole_numbers(grid=Grid(bits=4, exponents=(-2, -3)), scale=0.01), Defect.ARRAYS),
        (lambda: whole_numbers() | {"levels": np.full(15, -128, np.int8)}, Defect.ARRAYS),
        (lambda: whole_numbers() | {"levels": np.zeros(16, np.int8)}, Defect.ARRAYS),
        (lambda: whole_numbers(scale=np.inf), Defect.ARRAYS),
        (lambda: whole_numbers(scale=1e3), Defect.NORM),
    ],
)
def test_a_bad_reply_in_whole_numbers_is_refused_with_the_code_of_a_bad_float(arrays, code):
    with np.errstate(invalid="ignore"):
        judged = judge_reply(grid_reply(arrays()), grid_question(), HOSPITAL)
    assert judged == Rejection(outcome=Outcome.INVALID, code=code.value)


def test_whole_numbers_are_refused_where_floats_were_asked_for():
    content = {"arrays": to_record(whole_numbers()), "metrics": MetricRecord(dict(METRICS))}
    assert judge_reply(reply(content), question(), HOSPITAL).code == Defect.ARRAYS
    asked = replace(grid_question(), envelope=question().envelope)
    assert judge_reply(grid_reply(whole_numbers()), asked, HOSPITAL).code == Defect.ENVELOPE


def test_the_norm_limit_is_that_of_floats_and_what_rounding_may_add():
    """An update right at the limit passes however it was rounded; a tenth more does not."""
    limit = 10 * update_norm_bound(
        question().plan, num_parameters=15, enrolled=200, noise_multiplier=1.0, weights_norm=1.0
    )
    unit = limit / l2_norm(some_parameters(3))
    for scale, accepted in [(unit, True), (1.1 * unit, False)]:
        judged = judge_reply(grid_reply(whole_numbers(scale=scale)), grid_question(), HOSPITAL)
        assert isinstance(judged, Update) is accepted
