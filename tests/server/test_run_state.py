"""A state that has a successor keeps no model, whoever still refers to it."""

import gc
import weakref

import numpy as np

from common.config import FederationConfig
from server.run_state import RunState
from server.server_optimizer import OptimizerState


def arrays(value):
    return {"w": np.full(3, value, np.float32)}


def state(**more):
    config = FederationConfig()
    return RunState.start(config, run_id="run", weights=arrays(1), **more)


def test_what_the_successor_does_not_have_is_gone():
    from dataclasses import replace

    first = replace(state(), average=arrays(2), optimizer=OptimizerState(first_moment=arrays(3)))
    caller = first
    old = [weakref.ref(part["w"]) for part in (first.weights, first.average, first.optimizer.first_moment)]
    optimizer = OptimizerState(first_moment=arrays(6))
    after = replace(first, round_number=1, weights=arrays(4), average=arrays(5), optimizer=optimizer)
    first.let_go(after)
    gc.collect()
    assert not any(one() for one in old)
    assert caller.weights == {}
    assert after.weights["w"].tolist() == [4, 4, 4]
    assert after.average["w"].tolist() == [5, 5, 5]
    assert after.optimizer.first_moment["w"].tolist() == [6, 6, 6]


def test_what_both_have_stays():
    from dataclasses import replace

    first = state()
    same = replace(first, hospitals={})
    first.let_go(same)
    assert same.weights["w"].tolist() == [1, 1, 1]
