"""Whom the plan is for: files and flags, the ledger looked at and left as it is, images only when needed."""

import hashlib
import json
import shutil

import pytest

from client.ledger.ledger import Ledger
from client.planning.hospital import measured_step, num_parameters
from client.planning.outlook import look_ahead
from common.errors import ConfigError, DataError, LedgerError, ModelError, RefusalCode
from common.messages import refusal_code
from tests.client.planning.planned_hospital import enrol, found, outlook_of, train
from tests.client.small_hospital import CLASSES, PATIENTS, charges, make_hospital, make_plan

pytestmark = pytest.mark.usefixtures("flower_identity")


def content_of(folder):
    """Every file of a folder with its hash and time; the lock is what `verify` takes, too."""
    return {
        path.name: (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in folder.iterdir()
        if path.name != "ledger.lock"
    }


@pytest.fixture
def trained(tmp_path):
    toml = make_hospital(tmp_path / "north")
    enrol(toml)
    train(toml, make_plan(), rounds=2)
    return toml


def test_the_ledger_is_looked_at_and_left_as_it_is(trained):
    ledger = trained.parent / "ledger"
    # As a crash between commit and head leaves it; the next training renews the head, a plan does not.
    head = json.loads((ledger / "head.json").read_text())
    train(trained, make_plan(), run_id="second", rounds=1)
    (ledger / "head.json").write_text(json.dumps(head))
    before, outbox = content_of(ledger), content_of(trained.parent / "state" / "outbox")
    planned = outlook_of(trained)
    assert planned.epsilon_after > planned.epsilon > 0
    assert content_of(ledger) == before
    assert content_of(trained.parent / "state" / "outbox") == outbox


def test_a_plan_makes_no_ledger_where_there_is_none(tmp_path):
    toml = make_hospital(tmp_path / "north")
    enrol(toml)
    before = sorted(tmp_path.rglob("*"))
    assert found(toml).ledger == "none yet"
    assert sorted(tmp_path.rglob("*")) == before


def test_images_are_read_only_to_compare_patients_with_charges(trained, tmp_path):
    untouched = make_hospital(tmp_path / "new")
    enrol(untouched)
    shutil.rmtree(untouched.parent / "data")
    assert list(found(untouched).histories) == [()]

    shutil.rmtree(trained.parent / "data")
    assert list(found(trained, with_ledger=False).histories) == [()]
    with pytest.raises(DataError):
        found(trained)


def test_the_patients_compared_are_those_that_are_charged(tmp_path, monkeypatch):
    """Also where a part of them validates, which the site's key decides."""
    toml = make_hospital(tmp_path / "north", validation_share=0.5)
    enrol(toml)
    train(toml, make_plan(), rounds=1)
    asked = []
    monkeypatch.setattr(Ledger, "histories", lambda _, cohort, **__: [asked.append(cohort)] and [()])
    found(toml)
    (charge,) = charges(toml)
    assert [cohort.digest for cohort in asked] == [charge.cohort_digest]
    assert 0 < asked[0].size < PATIENTS


def test_a_damaged_ledger_is_not_planned_with(trained):
    (trained.parent / "ledger" / "head.json").write_text("{}")
    with pytest.raises(LedgerError) as caught:
        found(trained)
    assert caught.value.why
    assert "ledger verify" in caught.value.fix


def test_images_without_patients_are_refused_where_the_run_protects_patients(tmp_path):
    toml = make_hospital(tmp_path / "north", unit="image")
    by_image = make_plan(data={"unit": "image"})
    train(toml, by_image, rounds=1)
    enrol(toml, by_image)
    assert found(toml).unit == "image"
    assert outlook_of(toml).plan.unit == "image"
    enrol(toml, make_plan())
    assert "these images name none" in outlook_of(toml).refusal
    assert refusal_code(train(toml, make_plan(), run_id="second")[0]) is RefusalCode.DATA


def test_flags_replace_what_the_files_say(trained):
    hospital = found(
        trained,
        hospital_changes={"policy.epsilon": 3.0, "hospital.enrolled-patients": 500, "policy.delta": None},
        study_changes={"federation.rounds": 7, "privacy.sampling-rate": 0.25, "model.name": None},
    )
    assert (hospital.config.policy.epsilon, hospital.config.delta) == (3.0, 1 / 5000)
    assert hospital.study.federation.rounds == 7
    assert hospital.study.privacy == make_plan(privacy={"sampling-rate": 0.25}).privacy
    assert hospital.study.model == make_plan().model
    assert hospital.study_from.startswith("enrolment.toml, with other policy.epsilon")
    assert "model.name" not in hospital.study_from
    assert hospital.histories == found(trained).histories


def test_without_an_enrolment_the_study_is_the_defaults_with_the_hospitals_classes(tmp_path):
    toml = make_hospital(tmp_path / "north", classes=CLASSES[::-1])
    hospital = found(toml)
    assert hospital.study == make_plan(
        federation={"rounds": 20},
        data={"classes": CLASSES[::-1], "image-size": 28},
        model={"name": "cnn-small"},
        privacy={"local-steps": 1},
    )
    assert "no enrolment.toml yet" in hospital.study_from
    assert look_ahead(hospital.config, hospital.study, hospital.histories).refusal == ""


def test_an_enrolment_for_another_hospital_is_refused(tmp_path):
    toml = make_hospital(tmp_path / "south", name="south")
    enrol(toml)
    with pytest.raises(ConfigError, match="enrolment"):
        found(toml)


def test_without_a_folder_the_number_of_patients_suffices(tmp_path):
    nobody = tmp_path / "nowhere" / "hospital.toml"
    with pytest.raises(ConfigError) as caught:
        found(nobody)
    assert "--patients" in caught.value.fix
    hospital = found(nobody, hospital_changes={"hospital.enrolled-patients": 940})
    assert (hospital.config.hospital.enrolled_patients, list(hospital.histories)) == (940, [()])


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("study_changes", {"privacy.sampling-rate": 2.0}),
        ("study_changes", {"federation.rounds": 0}),
        ("study_changes", {"data.channels": 2}),
        ("hospital_changes", {"policy.epsilon": float("nan")}),
    ],
)
def test_an_impossible_flag_is_refused_by_its_key(trained, kind, changes):
    with pytest.raises(ConfigError) as caught:
        found(trained, **{kind: changes})
    assert next(iter(changes)) in caught.value.what


def test_the_time_of_a_step_is_measured_on_the_planned_model(trained):
    hospital = found(trained, study_changes={"model.name": "softmax"})
    measured = measured_step(hospital.config, hospital.study)
    assert 0 < measured.seconds < 5
    assert measured.device.startswith("cpu, ")
    assert num_parameters(hospital.study) == 8 * 8 * 2 + 2
    with pytest.raises(ModelError):
        num_parameters(found(trained, study_changes={"model.name": "none"}).study)
