"""The operator's commands as a person types them, in processes of their own."""

import json
import stat
import subprocess
import time
import tomllib

import pytest

from common.enrolment import Enrolment
from common.settings import load
from server.provisioning.operator_config import OperatorFolder
from tests.run_folders import build_run
from tests.server.provisioning.federations import flower_server, hospital_key


def done(*arguments, **options):
    result = flower_server(*arguments, **options)
    assert result.returncode == 0, result.stderr
    return result.stdout


def init(path, *more):
    from common.flower_programs import free_ports

    listen, superlink, health = free_ports(3)
    return done(
        *("init", path, "--name", "chest", "--address", "fl.example.org:8443", "--rounds", 5),
        *("--listen", f"127.0.0.1:{listen}", "--classes", "normal,pneumonia", "--image-size", 28),
        *("--set", f"network.superlink-port={superlink}", "--set", f"network.health-port={health}", *more),
    )


def test_from_nothing_to_a_checked_federation_and_a_revoked_hospital(tmp_path):
    op = tmp_path / "op"
    said = init(op)
    assert "fl.example.org, localhost, 127.0.0.1" in said
    assert "flower-server enroll" in said
    for name in ("north", "south", "west"):
        hospital_key(tmp_path, name)
        said = done("enroll", name, tmp_path / f"{name}.key.pub", "--patients", 400, "--dir", op)
        assert "SHA256:" in said
        assert str(op / "enrolments" / f"{name}.toml") in said
    enrolment = load(Enrolment, op / "enrolments" / "north.toml")
    assert (enrolment.hospital, enrolment.enrolled_patients) == ("north", 400)
    assert enrolment.address == "fl.example.org:8443"
    assert enrolment.ca_certificate == (op / "ca" / "ca.crt").read_text()
    assert enrolment.plan.federation.rounds == 5
    assert enrolment.plan.data.classes == ("normal", "pneumonia")
    checked = flower_server("check", op, "--format", "json")
    rows = {row["name"]: row for row in json.loads(checked.stdout)["checks"]}
    assert checked.returncode == 0, rows
    assert rows["roster"]["result"] == "3 enrolled, 2 needed for a round"
    assert "never taken again" in done("revoke", "south", "--dir", op)
    assert not (op / "enrolments" / "south.toml").exists()
    listed = json.loads(done("roster", "--dir", op, "--format", "json"))
    assert [(row["name"], row["revoked_at"] is None) for row in listed] == [
        ("north", True),
        ("south", False),
        ("west", True),
    ]
    assert listed[0]["fingerprint"] in done("roster", "--dir", op)  # whole, also in a pipe
    done("revoke", "west", "--dir", op)
    checked = flower_server("check", op)
    assert checked.returncode == 1
    assert "failed: 1 enrolled, 2" in checked.stdout
    assert "what to do" in checked.stdout


def test_commands_work_from_inside_the_folder(tmp_path):
    op = tmp_path / "op"
    init(op)
    key = hospital_key(tmp_path, "north")
    done("enroll", "north", key, "--patients", 400, cwd=op)
    assert "north" in done("roster", cwd=op)
    assert "no run yet" in done("status", cwd=op)
    assert "new server certificate" in done("renew", cwd=op)
    assert "no runs in" in done("list", cwd=op)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("enroll", "north", "{tmp}/south.key.pub", "--patients", 400), "with another key"),
        (("enroll", "south", "{tmp}/north.key.pub", "--patients", 400), "one key is one hospital"),
        (("enroll", "south", "{tmp}/south.key", "--patients", 400), "is a private key"),
        (("enroll", "south", "{tmp}/nothing", "--patients", 400), "there is no file"),
        (("enroll", "../x", "{tmp}/south.key.pub", "--patients", 400), "name"),
        (("enroll", "south", "{tmp}/south.key.pub"), "--patients"),
        (("enroll", "south", "{tmp}/south.key.pub", "--patients", 0), "--patients"),
        (("revoke", "nobody"), "not on the roster"),
        (("init", "{op}", "--name", "chest", "--address", "a:1"), "is not empty"),
        (("init", "{tmp}/new", "--name", "chest", "--address", "a"), "network.address"),
        (("init", "{tmp}/new", "--name", "chest", "--address", "a:1", "--set", "server.x=1"), "server.x"),
        (("report",), "has had no run"),
        (("resume",), "has had no run"),
        (("resume", "run-9"), "not the folder of a run"),
        (("start", "{tmp}"), "is not the folder of a federation"),
        (("status", "--dir", "{tmp}"), "is not the folder of a federation"),
        (("backup", "--out", "{op}/roster.json"), "exists already"),
        (("restore", "{op}/roster.json", "{tmp}/back"), "cannot be restored"),
    ],
)
def test_mistakes_are_explained_and_end_with_2(mistaken, arguments, words):
    tmp, op = mistaken
    filled = [str(part).format(tmp=tmp, op=op) for part in arguments]
    before = {path: path.read_bytes() for path in op.rglob("*") if path.is_file()}
    result = flower_server(*filled, cwd=op)
    assert result.returncode == 2
    assert words in result.stderr
    assert "Traceback" not in result.stderr
    assert before == {path: path.read_bytes() for path in op.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory):
    tmp = tmp_path_factory.mktemp("mistakes")
    init(tmp / "op")
    for name in ("north", "south"):
        hospital_key(tmp, name)
    done("enroll", "north", tmp / "north.key.pub", "--patients", 400, "--dir", tmp / "op")
    return tmp, tmp / "op"


def test_the_count_is_public_so_a_precise_one_is_questioned(mistaken):
    tmp, op = mistaken
    key = tmp / "north.key.pub"
    assert "not rounded" in flower_server("enroll", "north", key, "--patients", 403, "--dir", op).stderr
    said = flower_server("enroll", "north", key, "--patients", 400, "--dir", op)
    assert "patient count changed" in said.stdout
    assert "applies from the next run" in said.stdout
    assert said.stderr == ""


def test_replace_a_lost_key(tmp_path):
    op = tmp_path / "op"
    init(op)
    old, new = hospital_key(tmp_path, "old"), hospital_key(tmp_path, "new")
    done("enroll", "north", old, "--patients", 400, "--dir", op)
    said = done(
        *("enroll", "north", new, "--patients", 400, "--replace-key", "--dir", op, "--format", "json")
    )
    answer = json.loads(said)
    assert answer["change"] == "key replaced"
    assert load(Enrolment, op / "enrolments" / "north.toml").fingerprint == answer["fingerprint"]
    assert flower_server("enroll", "north", old, "--patients", 400, "--dir", op).returncode == 2


def test_the_current_run_needs_no_name(tmp_path):
    op = tmp_path / "op"
    init(op)
    folder = OperatorFolder(op)
    folder.remember_run(op / "runs" / "run-0001")
    (op / "runs" / "run-0001").mkdir()
    assert "the run run-0001 waits for its hospitals" in done("status", cwd=op)
    build_run(op / "runs" / "run-0001", run_id="run-0001")
    assert [row["run_id"] for row in json.loads(done("list", "--dir", op, "--format", "json"))] == [
        "run-0001"
    ]
    for options in ({"cwd": op}, {}):
        named = ("--dir", op) if not options else ()
        overview = json.loads(done("status", *named, "--format", "json", **options))
        assert (overview["run_id"], overview["federation"]) == ("run-0001", "chest")
        assert overview["server"]["server"] == "unreachable"
    assert "round 6 of 6" in done("status", "run-0001", "--dir", op)
    assert done("report", "--dir", op).strip() == str(op / "runs" / "run-0001" / "report.html")
    assert "is not going on" in flower_server("stop", cwd=op).stderr
    finished = flower_server("resume", "--dir", op)
    assert finished.returncode == 2
    assert "completed" in finished.stderr


def test_backup_and_restore_as_commands(tmp_path):
    op = tmp_path / "op"
    init(op)
    out = tmp_path / "b.tar.gz"
    assert "private keys" in done("backup", op, "--out", out)
    assert stat.S_IMODE(out.stat().st_mode) == 0o600
    assert "flower-server check" in done("restore", out, tmp_path / "back")
    back = tomllib.loads((tmp_path / "back" / "federation.toml").read_text())
    assert back == tomllib.loads((op / "federation.toml").read_text())


def test_every_command_explains_itself_quickly():
    commands = (
        "init enroll revoke roster check start resume renew backup restore status stop list report export"
    )
    for command in commands.split():
        began = time.perf_counter()
        shown = done(command, "--help")
        assert time.perf_counter() - began < 2
        assert "Usage" in shown


def test_a_new_authority_keeps_the_old_one_and_makes_every_hospitals_file_anew(tmp_path):
    op = tmp_path / "op"
    init(op)
    for name in ("north", "south"):
        done("enroll", name, hospital_key(tmp_path, name), "--patients", 400, "--dir", op)
    done("revoke", "south", "--dir", op)
    old, old_key = (op / "ca" / "ca.crt").read_bytes(), (op / "ca" / "ca.key").read_bytes()
    said = done("renew", op, "--authority")
    new = (op / "ca" / "ca.crt").read_text()
    assert new.encode() != old
    assert (op / "ca" / "ca.key").stat().st_mode & 0o777 == 0o600
    kept = {path.read_bytes(): path.stat().st_mode & 0o777 for path in (op / "ca").glob("*.old-*")}
    assert set(kept) == {old, old_key}
    assert kept[old_key] == 0o600
    assert tomllib.loads((op / "enrolments" / "north.toml").read_text())["ca-certificate"] == new
    assert "north.toml to its hospital" in said
    assert not (op / "enrolments" / "south.toml").exists()
    subprocess.run(
        ["openssl", "verify", "-x509_strict", "-CAfile", op / "ca" / "ca.crt", op / "tls" / "server.crt"],
        check=True,
        capture_output=True,
    )
    (op / "ca" / "ca.key").unlink()  # a lost key is no hindrance
    done("renew", op, "--authority")
