"""Starts that cannot work say why and leave everything as it was; children that live and do not answer."""

import json
import os
import signal
import socket
import sqlite3
import sys
import time

import pytest

from common.child_process import ChildProcess
from common.errors import ConfigError
from server.deployment import children, server_process
from server.deployment.children import Kept
from server.deployment.endings import LAST_ERROR, Ending
from server.deployment.probes import Answer, front_answer, superlink_answer
from server.deployment.run_choice import choose_folder, take_run
from server.deployment.supervisor import start
from server.deployment.told import CertificateLines
from server.provisioning.certificates import issue_server_certificate
from server.provisioning.database import tidy
from server.provisioning.enrolments import renew_authority
from tests.server.deployment.small_federation import make_folder


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path / "operator")


def with_certificate(folder, *, days, names=("localhost", "127.0.0.1")):
    issue_server_certificate(
        *(folder.server_key, folder.server_certificate),
        authority_key=folder.ca_key,
        authority=folder.ca_certificate,
        names=names,
        days=days,
    )


def stopped_run(folder):
    run = folder.runs / "small-20260101-000000-00000000"
    run.mkdir(parents=True)
    (run / "result.json").write_text(json.dumps({"status": "stopped"}))
    (run / "stop").touch()
    folder.remember_run(run)
    return run


@pytest.mark.parametrize(
    ("certificate", "words"),
    [
        ({"days": -0.5}, "expired"),
        ({"days": 300, "names": ("other.example.org",)}, "the address needs localhost"),
    ],
)
def test_a_certificate_that_no_hospital_would_trust_is_refused_with_its_own_words(folder, certificate, words):
    with_certificate(folder, **certificate)
    with pytest.raises(ConfigError, match="server certificate cannot be used") as refused:
        start(folder)
    assert words in refused.value.why
    assert "flower-server renew" in refused.value.fix


def test_the_last_days_of_the_certificate_are_told_once_a_day(folder):
    with_certificate(folder, days=29.5)
    said, now = [], [time.time()]
    lines = CertificateLines(folder, clock=lambda: now[0])
    for days in (0.0, 0.5, 0.6, 28.9):
        now[0] += days * 86_400
        lines.tell(said.append)
    assert [line.partition(";")[0].rpartition("certificate ")[2] for line in said] == [
        "ends in 30 days" if "ends in 30" in said[0] else "ends in 29 days",
        "ends in 28 days",
        "has expired: hospitals refuse this server",
    ]
    with_certificate(folder, days=31)
    CertificateLines(folder).tell(said.append)
    assert len(said) == 3


@pytest.mark.parametrize("section", ["superlink-port", "listen"])
def test_a_start_that_finds_its_port_taken_changes_nothing(folder, monkeypatch, section):
    monkeypatch.setattr(children, "_PORT_S", 0.3)
    network, run = folder.config().network, stopped_run(folder)
    port = network.superlink_port if section == "superlink-port" else int(network.listen.rpartition(":")[2])
    before = {path: path.read_bytes() for path in (run / "result.json", folder.current_run, run / "stop")}
    for options in ({"resume": True}, {"new": True})[: 2 if section == "superlink-port" else 1]:
        with socket.create_server(("127.0.0.1", port)), pytest.raises(ConfigError, match=f"port {port}"):
            start(folder, **options)
        assert {path: path.read_bytes() for path in before} == before
        assert list(folder.runs.iterdir()) == [run]


def test_a_run_is_taken_only_when_it_is_told_to(folder):
    run = stopped_run(folder)
    other = folder.runs / "other"
    other.mkdir()
    with pytest.raises(ConfigError, match="is stopped"):
        choose_folder(folder, folder.config(), new=False, resume=False)
    assert choose_folder(folder, folder.config(), new=False, resume=True) == run
    assert choose_folder(folder, folder.config(), new=False, resume=True, run=other) == other
    assert (run / "result.json").exists()
    take_run(folder, run, resume=True)
    assert not (run / "result.json").exists()
    assert not (run / "stop").exists()


def test_the_authority_is_not_renewed_under_a_server_that_runs(folder):
    import subprocess

    folder.state.mkdir(exist_ok=True)
    holder = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, fcntl.LOCK_EX); print(); input()"
    before = folder.ca_certificate.read_bytes()
    command = [sys.executable, "-c", holder, str(folder.lock)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        server.stdout.readline()
        with pytest.raises(ConfigError, match="is running") as refused:
            renew_authority(folder)
        server.communicate(b"\n")
    assert "end it first" in refused.value.fix
    assert folder.ca_certificate.read_bytes() == before
    renew_authority(folder)


def test_an_error_that_nobody_has_foreseen_is_a_death_and_has_a_name(folder, monkeypatch):
    def serve(folder, run):
        raise UnicodeDecodeError("utf-8", b"\xff", 0, 1, "DOE_JOHN")

    monkeypatch.setattr(server_process, "serve", serve)
    monkeypatch.setattr(sys, "argv", ["server_process", str(folder.path), str(folder.runs / "x")])
    with pytest.raises(SystemExit) as ended:
        server_process.main()
    assert ended.value.code == Ending.CRASHED
    said = (folder.state / LAST_ERROR).read_text()
    assert "UnicodeDecodeError" in said
    assert "logs/federation.log" in said
    # Python's own status for an uncaught exception must not look like one of ours.
    assert 1 not in [ending.value for ending in Ending]


def test_a_child_that_lives_and_does_not_answer_is_started_anew(tmp_path):
    command = [sys.executable, "-c", "import time; time.sleep(60)"]
    kept = Kept(process=ChildProcess(command, log=tmp_path / "log", name="child"), pause_s=0.0)
    kept.start()
    try:
        pid = kept.process.pid
        assert not any(kept.heard(Answer.NONE) for _ in range(5))  # it may still be starting
        assert not kept.heard(Answer.WELL)
        os.kill(pid, signal.SIGSTOP)
        assert [kept.heard(a) for a in (Answer.NONE, Answer.NONE, Answer.UNTRUSTED)] == [False] * 3
        assert [kept.heard(Answer.NONE) for _ in range(3)] == [False, False, True]
        assert kept.revive()
        assert kept.process.pid != pid
        assert not any(kept.heard(Answer.NONE) for _ in range(5))
    finally:
        kept.process.stop()


def test_a_port_that_takes_calls_and_never_answers_is_no_answer(folder):
    network = folder.config().network
    listen = int(network.listen.rpartition(":")[2])
    with (
        socket.create_server(("127.0.0.1", listen)),
        socket.create_server(("127.0.0.1", network.superlink_port)),
    ):
        assert front_answer(folder, folder.config(), timeout_s=0.3) is Answer.NONE
        assert superlink_answer(folder, folder.config(), timeout_s=0.3) is Answer.NONE


def test_an_expired_certificate_is_no_silence(folder):
    import ssl
    import threading

    with_certificate(folder, days=-0.5)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(folder.server_certificate, folder.server_key)
    listen = int(folder.config().network.listen.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", listen)) as server:

        def serve():
            connection, _ = server.accept()
            try:
                context.wrap_socket(connection, server_side=True)
            except OSError:
                connection.close()

        thread = threading.Thread(target=serve)
        thread.start()
        assert front_answer(folder, folder.config()) is Answer.UNTRUSTED
        thread.join(10)


def test_what_old_runs_left_in_the_database_is_given_back_to_the_disk(tmp_path, caplog):
    path = tmp_path / "superlink.db"
    tidy(path)
    assert not path.exists()
    with sqlite3.connect(path) as database:
        database.execute("CREATE TABLE objects (content BLOB)")
        database.execute("CREATE TABLE node (name TEXT)")
        database.execute("INSERT INTO node VALUES ('a')")
        database.executemany("INSERT INTO objects VALUES (?)", [(b"x" * 10**6,)] * 5)
    database.close()
    assert path.stat().st_size > 5 * 10**6
    tidy(path)
    assert path.stat().st_size < 10**5
    with sqlite3.connect(path) as database:
        assert database.execute("SELECT name FROM node").fetchall() == [("a",)]
    database.close()
    path.write_bytes(b"no database at all" * 100)
    tidy(path)  # its words come from the SuperLink
    assert "was not tidied up" in caplog.text
