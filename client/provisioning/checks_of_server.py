"""The lines of `flower-client check` that need the server: connection, clock, certificate, code, versions."""

import importlib.metadata
from collections.abc import Iterator, Mapping

from client.deployment.hospital_folder import HospitalFolder
from client.provisioning.code_list import accepted
from client.server_answer import Answer, ServerState, proxy_of_environment, without_password
from common.bundle.bundle import bundle_sha256
from common.checks import Check, CheckState
from common.enrolment import Enrolment
from common.errors import printable
from common.health import Health, ask_health
from common.messages import SCHEMA_VERSION
from common.node_keys import load_private_key

WARN_DAYS = 30.0
_WARN_AHEAD_S, _WARN_BEHIND_S = 2.0, 60.0
_PASSING = frozenset({ServerState.BUSY, ServerState.TIMEOUT, ServerState.UNREACHABLE})


def check_server(folder: HospitalFolder, enrolment: Enrolment | None, *, timeout_s: float) -> Iterator[Check]:
    """Ask the server once and say everything that its answer tells."""
    if enrolment is None:
        yield Check(
            name="server",
            state=CheckState.FAILED,
            result="not asked: there is no usable enrolment.toml yet",
            fix="send keys/hospital.key.pub to the operator, who sends enrolment.toml back",
        )
        return
    from client.connection import ask_server

    yield _proxy(folder, enrolment)
    answer = ask_server(
        enrolment,
        load_private_key(folder.key_file),
        https_proxy=folder.config.connection.https_proxy,
        timeout_s=timeout_s,
    )
    yield _connection(folder, answer)
    yield from _clock(answer)
    yield from _certificate(answer)
    yield from _release(enrolment, answer)
    yield _bundle(folder, enrolment, answer)


def _proxy(folder: HospitalFolder, enrolment: Enrolment) -> Check:
    setting = folder.config.connection.https_proxy
    found = setting or proxy_of_environment(enrolment.address)
    source = "https-proxy" if setting else "environment"
    result = f"{without_password(found)} ({source})" if found else "none: straight out"
    return Check(name="proxy", state=CheckState.OK, result=result)


def _connection(folder: HospitalFolder, answer: Answer) -> Check:
    if answer.state is ServerState.READY:
        return Check(name="server", state=CheckState.OK, result=answer.what)
    if answer.state is ServerState.ONLINE:
        if ask_health(folder.config.connection.health_port) is not Health.UNREACHABLE:
            return Check(
                name="server", state=CheckState.OK, result="connected: this hospital's client is online"
            )
        return Check(
            name="server", state=CheckState.WARNING, result=f"{answer.what}: {answer.why}", fix=answer.fix
        )
    return Check(
        name="server", state=CheckState.FAILED, result=f"{answer.what}: {answer.why}", fix=answer.fix
    )


def _clock(answer: Answer) -> Iterator[Check]:
    skew = answer.clock_skew_s
    if skew is None or answer.state is ServerState.CLOCK:  # said already
        return
    is_far = skew > _WARN_AHEAD_S or skew < -_WARN_BEHIND_S
    yield Check(
        name="clock",
        state=CheckState.WARNING if is_far else CheckState.OK,
        result=f"{abs(skew):.0f} s {'ahead of' if skew > 0 else 'behind'} the server's; "
        "allowed: 5 s ahead / 305 s behind",
        fix="switch time synchronisation on (timedatectl set-ntp true)" if is_far else "",
    )


def _certificate(answer: Answer) -> Iterator[Check]:
    days = answer.certificate_days_left
    if days is not None:
        is_old = days < WARN_DAYS
        yield Check(
            name="certificate",
            state=CheckState.WARNING if is_old else CheckState.OK,
            result=f"the server's is valid for {days:.0f} more days",
            fix="remind the operator: flower-server renew" if is_old else "",
        )


def _release(enrolment: Enrolment, answer: Answer) -> Iterator[Check]:
    own = importlib.metadata.version("hospital-federation")
    theirs, schema = answer.server_release, answer.server_schema
    told = "says" if theirs else "said at the enrolment"
    theirs, schema = theirs or printable(enrolment.release), schema or enrolment.wire_schema
    yield Check(
        name="release",
        state=CheckState.OK if theirs == own else CheckState.FAILED,
        result=f"{own} here, the server {told} {theirs}",
        fix="" if theirs == own else f"install release {theirs} of hospital-federation, or ask the operator",
    )
    yield Check(
        name="wire schema",
        state=CheckState.OK if schema == SCHEMA_VERSION else CheckState.FAILED,
        result=f"{SCHEMA_VERSION} here, {schema} at the server",
        fix="" if schema == SCHEMA_VERSION else f"install the server's release, {theirs}",
    )


def _bundle(folder: HospitalFolder, enrolment: Enrolment, answer: Answer) -> Check:
    digest = answer.server_bundle or enrolment.bundle_sha256
    notes = {code.sha256: printable(code.note) or "without a note" for code in accepted(folder.state)}
    is_known = digest in notes
    return Check(
        name="bundle",
        state=CheckState.OK if is_known else CheckState.FAILED,
        result=f"{_name_of(digest, notes, answer.server_release or printable(enrolment.release))}, "
        f"sha256 {digest}: {'on' if is_known else 'NOT on'} this hospital's list",
        fix="" if is_known else f"compare it with the operator's, then: flower-client code accept {digest}",
    )


def _name_of(digest: str, notes: Mapping[str, str], told: str) -> str:
    """Publisher, name and version where this installation knows them; else who says what."""
    if digest == bundle_sha256():
        return f"hospital-federation/hospital-federation {importlib.metadata.version('hospital-federation')}"
    if digest in notes:
        return f"a bundle accepted as: {notes[digest]}"
    return f"a bundle that is not the installed one; its server says that it is release {told}"
