"""A hospital in operation, from outside: a real server asks; answers, files and processes tell the rest."""

import base64
import itertools
import os
import stat
import time
import warnings
from pathlib import Path

import pytest
from flwr.app import Message, RecordDict
from flwr.cli.build import build_fab_from_files

from client.provisioning.standing import leave, pause, unpause
from client.server_answer import ServerState
from common import messages
from common.bundle.bundle import bundle_bytes
from common.errors import RefusalCode
from common.health import Health, ask_health
from tests.client import small_hospital
from tests.client.certificates import Authority
from tests.client.deployment.running_hospital import (
    Federation,
    RunningHospital,
    ask,
    hello,
    send,
    wait_for,
)
from tests.client.small_hospital import charges, make_hospital, make_plan, training_request

pytestmark = [pytest.mark.faults, pytest.mark.ci]

MILD = {"allow_non_private": True}


@pytest.fixture(scope="module")
def operation(tmp_path_factory):
    """One server, one hospital, one run, for all tests of this file."""
    folder = tmp_path_factory.mktemp("operation")
    with Federation(folder / "server", Authority()) as server:
        hospital = RunningHospital(
            folder / "north", server.authority, server.port, site={"threads": 2}, **MILD
        )
        node = wait_for(lambda: server.register(hospital.public, "north"), within_s=30)
        hospital.start()
        try:
            hospital.await_ready()
            yield server, hospital, node, server.start_run()
        finally:
            hospital.end()


def test_hello_is_answered_with_public_facts(operation):
    _, hospital, node, grid = operation
    reply = ask(grid, node, hello())
    facts = reply.content[messages.HOSPITAL]
    assert set(facts) == {"name", "enrolled-patients", "schema-version", "version", "flwr"}
    assert (facts["name"], facts["flwr"][:4]) == ("north", "1.41")
    assert hospital.audit()[-1]["what"] == "introduction"


def test_a_round_is_trained_charged_and_answered_once(operation):
    _, hospital, node, grid = operation
    request = training_request(run_id="first")
    reply = ask(grid, node, request)
    assert set(reply.content) == {
        messages.ENVELOPE,
        messages.ARRAYS,
        messages.METRICS,
        messages.LEDGER_RECEIPT,
    }
    again = ask(grid, node, request)
    assert [a.data for a in reply.content[messages.ARRAYS].values()] == [
        a.data for a in again.content[messages.ARRAYS].values()
    ]
    assert len([c for c in charges(hospital.toml) if c.key.run_id == "first"]) == 1
    wait_for(lambda: hospital.status()["last_round"] == 1, within_s=5)
    assert hospital.status()["run_epsilon"] == pytest.approx(reply.content[messages.METRICS]["epsilon"])


def test_a_reproducible_round_gives_the_bits_of_any_other_process(operation, tmp_path):
    _, _, node, grid = operation
    request = training_request(make_plan(federation={"reproducible": True}), run_id="reproducible")
    there = ask(grid, node, request).content
    here = small_hospital.ask(make_hospital(tmp_path / "twin", **MILD), request)
    assert [a.data for a in there[messages.ARRAYS].values()] == [
        a.data for a in here[messages.ARRAYS].values()
    ]


def test_tasks_in_a_row_take_less_than_a_second_each(operation):
    """While messages wait at the server its pauses after empty pulls do not show: what is left is ours.

    Of it up to 0.5 s is the SuperNode's, which looks for a reply that often.
    """
    _, _, node, grid = operation
    arrived = []
    waiting = {send(grid, node, hello()) for _ in range(6)}
    while waiting:
        for reply in grid.pull_messages(list(waiting)):
            waiting.remove(reply.metadata.reply_to_message_id)
            arrived.append(time.monotonic())
        time.sleep(0.02)
    each = sorted(later - earlier for earlier, later in itertools.pairwise(arrived))
    assert each[len(each) // 2] < 1.0, each


def test_health_and_status_tell_that_it_works(operation):
    _, hospital, *_ = operation
    for service in ("", "connection", "worker"):
        assert ask_health(hospital.health_port, service) is Health.SERVING
    status = hospital.status()
    assert (status["connected"], status["standing"], status["last_error"]) == (True, "takes part", "")


def test_asking_an_online_hospital_changes_nothing(operation):
    server, hospital, node, grid = operation
    before = hospital.processes()
    for _ in range(20):
        assert hospital.ask_server().state is ServerState.ONLINE
    assert server.status_of(node) == "online"
    assert ask(grid, node, hello()).content[messages.HOSPITAL]["name"] == "north"
    assert hospital.processes() == before
    log = (hospital.folder / "logs" / "supernode.log").read_text()
    assert log.count("SuperNode ID") == 1


def test_secrets_are_for_the_owner_only_and_not_on_the_command_line(operation):
    _, hospital, *_ = operation
    folder = hospital.state / "secrets"
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    secrets = [hospital.key, *(path for path in folder.iterdir() if path.suffix != ".crt")]
    assert folder / "superexec.bin" in secrets
    for path in (*secrets, hospital.state / "work.json"):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600, path
    forms = set()
    for content in (path.read_bytes() for path in secrets):
        forms |= {
            content,
            content.hex().encode(),
            base64.b64encode(content),
            base64.urlsafe_b64encode(content),
        }
        forms |= {line for line in content.splitlines() if len(line) >= 32 and b"-----" not in line}
    processes = {**hospital.processes(), "client": hospital.pid}
    assert set(processes) == {"client", "supernode", "worker"}
    for name, pid in processes.items():
        for file in ("cmdline", "environ"):
            said = Path(f"/proc/{pid}/{file}").read_bytes()
            assert b"--insecure" not in said
            assert not any(form in said for form in forms), (name, file)


def test_another_bundle_is_refused_before_anything_is_done_with_it(operation, tmp_path):
    server, hospital, node, _ = operation
    touched = tmp_path / "imported"
    code = f"open({str(touched)!r}, 'w').close()\n"
    planted = {
        "pyproject.toml": planted_description(),
        "client/__init__.py": code.encode(),
        "client/app.py": code.encode(),
        "planted.py": code.encode(),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Flower's builder uses an old name of pathspec
        bundle = build_fab_from_files(planted)[0]
    one_byte = bytearray(bundle_bytes())
    position = one_byte.rindex(b"BUNDLE.md") + 8  # in the archive's directory: still a readable bundle
    one_byte[position] ^= 1
    home = sorted(p for p in (hospital.state / "flower").rglob("*"))
    before, audit = len(charges(hospital.toml)), len(hospital.audit())
    for number, arriving in enumerate((bundle, bytes(one_byte))):
        grid = server.start_run(arriving)
        reply = ask(grid, node, training_request(run_id=f"planted-{number}"))
        assert messages.refusal_code(reply.content) is RefusalCode.CODE
        assert set(reply.content) == {messages.ENVELOPE, messages.REFUSAL}
    assert [line["what"] for line in hospital.audit()[audit:]] == ["refusal code-not-accepted"] * 2
    assert not touched.exists()
    assert sorted(p for p in (hospital.state / "flower").rglob("*")) == home, "nothing was unpacked"
    assert len(charges(hospital.toml)) == before
    assert hospital.status()["last_refusal"] == "code-not-accepted"


def planted_description() -> bytes:
    text = """[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "hospital-federation"
version = "0.1.0"
license = "Apache-2.0"
dependencies = []
[tool.flwr.app]
publisher = "hospital-federation"
fab-include = ["**/*.py"]
[tool.flwr.app.components]
serverapp = "planted:app"
clientapp = "client.app:app"
"""
    return text.encode()


def test_what_cannot_be_answered_is_an_error_without_words(operation):
    server, _, node, _ = operation
    grid = server.start_run()
    reply = ask(grid, node, Message(RecordDict(), 7, "query.unknown_to_all"))
    assert reply.has_error()
    assert not reply.error.reason
    assert ask(grid, node, hello()).content[messages.HOSPITAL]["name"] == "north"


def test_a_pause_refuses_rounds_and_ends_without_a_restart(operation):
    server, hospital, node, _ = operation
    grid = server.start_run()
    pause(hospital.state)
    reply = ask(grid, node, training_request(run_id="paused"))
    assert messages.refusal_code(reply.content) is RefusalCode.PAUSED
    wait_for(lambda: hospital.status()["standing"] == "paused", within_s=5)
    unpause(hospital.state)
    assert messages.ARRAYS in ask(grid, node, training_request(run_id="paused")).content


def test_a_second_client_for_the_same_folder_is_refused(operation):
    _, hospital, *_ = operation
    first, hospital._process = hospital._process, None
    try:
        hospital.start()
        assert hospital.wait() == 1
        assert "already running" in hospital.said()
    finally:
        hospital._process = first


def test_it_needs_little_when_nothing_is_asked(operation):
    _, hospital, *_ = operation
    pids = [hospital.pid, *hospital.processes().values()]
    before = [cpu_s(pid) for pid in pids]
    time.sleep(4)
    used = [after - earlier for after, earlier in zip((cpu_s(pid) for pid in pids), before, strict=True)]
    assert sum(used) < 1.2, used  # seconds of one core in four


def cpu_s(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def test_leaving_ends_the_client_and_its_processes(operation):
    """The last test of this file: it ends what the others use."""
    server, hospital, node, _ = operation
    processes = hospital.processes()
    assert set(processes) == {"supernode", "worker"}
    leave(hospital.state)
    assert hospital.wait() == 0
    assert "has left" in hospital.said()
    assert hospital.processes() == {}
    assert server.status_of(node) == "offline"
    hospital.start()
    assert hospital.wait() == 1
    assert "leave --off" in hospital.said()
