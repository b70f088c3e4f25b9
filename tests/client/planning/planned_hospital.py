"""A small hospital with an enrolment, as `flower-client plan` meets it."""

from pathlib import Path

from client.planning.hospital import planned_hospital
from client.planning.outlook import look_ahead
from common import messages
from common.enrolment import ENROLMENT, Enrolment
from common.settings import to_toml
from tests.client.small_hospital import ENROLLED, ask, make_plan, training_request


def enrol(toml: Path, plan=None) -> None:
    """Put the operator's file for this study beside `hospital.toml`."""
    enrolment = Enrolment(
        federation="films",
        hospital="north",
        enrolled_patients=ENROLLED,
        fingerprint="SHA256:" + "A" * 43,
        address="127.0.0.1:1",
        release="0.1.0",
        wire_schema=1,
        bundle_sha256="0" * 64,
        ca_certificate="none",
        plan=plan or make_plan(),
    )
    (toml.parent / ENROLMENT).write_text(to_toml(enrolment))


def found(toml: Path, *, hospital_changes=None, study_changes=None, **more):
    return planned_hospital(
        toml.parent, hospital_changes=hospital_changes or {}, study_changes=study_changes or {}, **more
    )


def outlook_of(toml: Path, **more):
    hospital = found(toml, **more)
    return look_ahead(hospital.config, hospital.study, hospital.histories, unit=hospital.unit)


def train(toml: Path, plan, *, run_id="run", rounds=None):
    """Ask for every round of the run, or its first ones, until the hospital refuses; the answers."""
    answers = []
    for number in range(1, (rounds or plan.federation.rounds) + 1):
        answers.append(ask(toml, training_request(plan, round_number=number, run_id=run_id)))
        if messages.ARRAYS not in answers[-1]:
            break
    return answers
