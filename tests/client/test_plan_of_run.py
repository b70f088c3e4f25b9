"""The plan of a run is that of its first charge: nothing may be chosen after an answer was seen."""

import pytest

from client.limits import Behind
from client.policy import TrainingRequest, agree
from client.site import _site
from common.errors import PolicyError, RefusalCode
from common.hospital_config import HospitalConfig
from common.messages import ARRAYS, refusal_code
from common.settings import load, to_toml
from tests.client.small_hospital import ask, charges, make_hospital, make_plan, training_request


@pytest.fixture
def hospital(tmp_path, flower_identity):
    toml = make_hospital(tmp_path / "north")
    assert ARRAYS in ask(toml, training_request())
    return toml


def change(toml, **policy):
    config = load(HospitalConfig, toml)
    values = config.policy.model_copy(update=policy)
    toml.write_text(to_toml(config.model_copy(update={"policy": values})))
    _site.cache_clear()  # a client that starts again


CHANGES = [
    {"local-steps": 1},
    {"local-steps": 3},
    {"sampling-rate": 0.3},
    {"sampling-rate": 1.0},
    {"l2-clip-norm": 0.5},
    {"max-images-per-patient": 1},
]


@pytest.mark.parametrize("changed", CHANGES, ids=str)
@pytest.mark.parametrize("where", [{"round_number": 2}, {"attempt": 2}, {"attempt": 3, "round_number": 4}])
def test_other_numbers_in_a_run_that_has_begun_are_refused_in_any_attempt(hospital, changed, where):
    before = charges(hospital)
    answer = ask(hospital, training_request(make_plan(privacy=changed), **where))
    assert refusal_code(answer) is RefusalCode.CONFLICT
    assert ARRAYS not in answer
    assert charges(hospital) == before
    # As it began it goes on, and another run may have these numbers.
    assert ARRAYS in ask(hospital, training_request(**where))
    assert ARRAYS in ask(hospital, training_request(make_plan(privacy=changed), run_id="another"))


def test_the_reason_is_told_at_home(hospital):
    ask(hospital, training_request(make_plan(privacy={"sampling-rate": 0.3}), round_number=2))
    log = (hospital.parent / "state" / "hospital.log").read_text()
    assert "the plan of a run that has begun was changed" in log
    assert "sampling-rate" in log


def test_more_noise_in_mid_run_ends_the_run_here(hospital):
    asked = make_plan(privacy={"minimum-noise-multiplier": 2.5})
    answer = ask(hospital, training_request(asked, round_number=2))
    assert refusal_code(answer) is RefusalCode.POLICY
    assert len(charges(hospital)) == 1
    for least in (0.5, 2.0):  # the run has as much
        asked = make_plan(privacy={"minimum-noise-multiplier": least})
        assert ARRAYS in ask(hospital, training_request(asked, round_number=2, attempt=2 if least > 1 else 1))
    assert {charge.event.noise_multiplier for charge in charges(hospital)} == {2.0}


@pytest.mark.parametrize("raised", [{"noise_multiplier": 3.0}, {"minimum_noise_multiplier": 3.0}])
def test_a_hospital_that_wants_more_noise_leaves_the_run_and_has_it_in_the_next(hospital, raised):
    change(hospital, **raised)
    assert refusal_code(ask(hospital, training_request(round_number=2))) is RefusalCode.POLICY
    assert len(charges(hospital)) == 1
    assert ARRAYS in ask(hospital, training_request(run_id="next"))
    assert charges(hospital)[-1].event.noise_multiplier == 3.0


def test_a_policy_with_less_noise_counts_from_the_next_run(hospital):
    change(hospital, noise_multiplier=1.5)
    assert ARRAYS in ask(hospital, training_request(round_number=2))
    assert ARRAYS in ask(hospital, training_request(run_id="next"))
    assert [charge.event.noise_multiplier for charge in charges(hospital)] == [2.0, 2.0, 1.5]


@pytest.mark.parametrize("mode", [{"mode": "fixed", "noise_multiplier": 4.0}, {"mode": "solve"}])
def test_the_noise_of_the_first_charge_stays_in_both_modes(tmp_path, mode):
    config = load(HospitalConfig, make_hospital(tmp_path / "north", **mode, minimum_noise_multiplier=1.0))

    def agreed(earlier, **privacy):
        asked = TrainingRequest.of(make_plan(privacy=privacy), round_number=2, unit="patient")
        return agree(config, asked, Behind(), earlier_noise_multiplier=earlier).noise_multiplier

    assert agreed(5.0) == 5.0
    assert agreed(5.0, **{"minimum-noise-multiplier": 5.0}) == 5.0
    for earlier, privacy in ((0.9, {}), (5.0, {"minimum-noise-multiplier": 5.1})):
        with pytest.raises(PolicyError, match="since its first round"):
            agreed(earlier, **privacy)
