"""Every way in which the server cannot be reached or does not want this hospital, in three lines each."""

import errno
import json
import socket
import ssl
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx

from client.server_answer import Answer, Line, ServerState
from client.server_certificate import SeenCertificate, look_at
from common.errors import printable

MOST_AHEAD_S, MOST_BEHIND_S = 5.0, 305.0
"""The server refuses a hospital whose clock is further away from its own than this."""
SESSION_EXPIRES_S = 60.0
"""Flower keeps the session of a hospital that vanished online for so long."""
_EXPIRED, _NOT_YET = 10, 9
_WRONG_NAME = (62, 64)
"""Verification codes of OpenSSL (X509_V_ERR_*)."""
_NOT_TLS = ("WRONG_VERSION_NUMBER", "HTTP_REQUEST", "UNKNOWN_PROTOCOL", "RECORD_LAYER_FAILURE")
_LATER = (502, 503, 504)
_NAMES_SHOWN = 10
_OTHER_FLOWER = 1001
"""Flower's code for releases that do not fit."""


def explain_failure(error: Exception, line: Line, *, timeout_s: float, now: datetime) -> Answer:
    """No answer came: find the reason below what httpx says."""
    causes = list(_causes(error))
    for cause in causes:
        if isinstance(cause, ssl.SSLCertVerificationError):
            return _certificate_refused(cause, line, timeout_s=timeout_s, now=now)
        if isinstance(cause, ssl.SSLError) and any(word in str(cause) for word in _NOT_TLS):
            return _not_tls(line)
    if isinstance(error, httpx.ProxyError):
        return _proxy_refused(printable(error), line)
    if isinstance(error, httpx.TimeoutException):
        return _timed_out(line, timeout_s, connecting=isinstance(error, httpx.ConnectTimeout))
    if isinstance(error, httpx.ConnectError | UnicodeError) and not any(
        isinstance(cause, ssl.SSLError) for cause in causes
    ):
        return _unreachable(causes, line)
    return Answer(
        state=ServerState.UNREACHABLE,
        what=f"the connection to {line.address} was cut before an answer came",
        why=f"{type(error).__name__}: {printable(error)}. A firewall that looks inside does this, "
        "or a restart",
        fix="try again; if it stays, let your network team allow TLS to this address without inspection",
    )


def explain_status(response: httpx.Response, line: Line) -> Answer:
    """An answer came, and it is not one of the usual ones."""
    status = response.status_code
    if status in _LATER:
        return Answer(
            state=ServerState.BUSY,
            what=f"{line.address} asks to come back later (HTTP {status})",
            why="the server is overloaded, restarting or under maintenance",
            fix="nothing to do here, flower-client tries again; ask the operator if it lasts for hours",
        )
    if status == httpx.codes.UNAUTHORIZED:
        return Answer(
            state=ServerState.OTHER,
            what=f"{line.address} does not accept the signature of key {line.fingerprint} (HTTP 401)",
            why="unless the clocks differ, something on the way has changed the request's headers",
            fix="let the proxy or firewall pass requests to this address unchanged",
        )
    return Answer(
        state=ServerState.OTHER,
        what=f"{line.address} answers, but not like the server of {line.federation} (HTTP {status})",
        why=f"it said: {_detail(response)}",
        fix="compare the address in enrolment.toml with the operator's; is a proxy's page in between?",
    )


def is_other_flower(response: httpx.Response) -> bool:
    """Whether the server refuses because its release of Flower does not fit."""
    try:
        return bool(json.loads(response.text)["code"] == _OTHER_FLOWER)
    except (ValueError, KeyError, TypeError, RecursionError):
        return False


def other_flower(response: httpx.Response, line: Line) -> Answer:
    """Its release of Flower does not fit: nothing was asked about the key."""
    return Answer(
        state=ServerState.OTHER,
        what=f"{line.address} runs another release of Flower (HTTP {response.status_code})",
        why=f"it said: {_detail(response)}",
        fix="install the release of hospital-federation that enrolment.toml names, or ask the operator",
    )


def not_enrolled(line: Line) -> Answer:
    """The server knows no such key."""
    if line.fingerprint == line.enrolled_fingerprint:
        return Answer(
            state=ServerState.REVOKED,
            what=f"{line.federation} does not know this key: fingerprint {line.fingerprint}",
            why=f"{line.hospital} was enrolled with it; the operator has revoked it since, "
            "or the server has not been started since the enrolment",
            fix="ask the operator to look: flower-server roster. A revoked key stays out; make another: "
            f"flower-client renew-key, then {_enroll_new_key(line)}",
        )
    return Answer(
        state=ServerState.NOT_ENROLLED,
        what=f"this key is not enrolled at {line.federation}: fingerprint {line.fingerprint}",
        why=f"enrolment.toml is for the key {line.enrolled_fingerprint} of {line.hospital}",
        fix=f"send keys/hospital.key.pub to the operator, who types: {_enroll_new_key(line)}",
    )


def is_online(line: Line) -> Answer:
    """The key is enrolled, and a session of it is online."""
    return Answer(
        state=ServerState.ONLINE,
        what=f"{line.hospital} is already connected to {line.federation}",
        why=f"a session with key {line.fingerprint} is online: this client's, one that ended without "
        f"saying so (it expires within {SESSION_EXPIRES_S:.0f} s), or one from elsewhere",
        fix="if no client of yours runs and it stays so, somebody else has this key: "
        f"ask the operator to revoke it (flower-server revoke {line.hospital})",
    )


def clock_refused(line: Line, *, now: datetime, skew_s: float, response: httpx.Response) -> Answer:
    """HTTP 401: the clock where it is outside the limits, otherwise something else."""
    if -MOST_BEHIND_S + 1 < skew_s < MOST_AHEAD_S - 1:
        return explain_status(response, line)
    side = "ahead of" if skew_s > 0 else "behind"
    return Answer(
        state=ServerState.CLOCK,
        what=f"this machine's clock is {abs(skew_s):.0f} s {side} the server's",
        why=f"here {_time(now)}, there {_time(now - timedelta(seconds=skew_s))}; "
        f"allowed: {MOST_AHEAD_S:.0f} s ahead / {MOST_BEHIND_S:.0f} s behind",
        fix="switch time synchronisation on (timedatectl set-ntp true), or correct the clock",
    )


def _certificate_refused(
    error: ssl.SSLCertVerificationError, line: Line, *, timeout_s: float, now: datetime
) -> Answer:
    seen = look_at(line.address, proxy=line.proxy, timeout_s=timeout_s)
    code = error.verify_code
    if code in _WRONG_NAME:
        return Answer(
            state=ServerState.NAME_WRONG,
            what=f"the certificate of {line.address} is not for {line.host}",
            why=f"expected name: {line.host}; names in the certificate: {_names(seen)}",
            fix="use one of these names as address in enrolment.toml, or ask the operator for a certificate "
            "with this name (flower-server renew, names in federation.toml)",
        )
    if code in (_EXPIRED, _NOT_YET):
        return _not_valid_now(code, line, seen, now)
    return Answer(
        state=ServerState.CA_WRONG,
        what=f"the certificate of {line.address} is not from the certificate authority of {line.federation}",
        why=f"expected name: {line.host}; names in the certificate: {_names(seen)}; issued by "
        f"{seen.issuer if seen else 'unknown'}; checked with ca-certificate in enrolment.toml "
        f"({error.verify_message})",
        fix="put the operator's newest enrolment.toml here; if the issuer is your own network's, have TLS "
        "inspection switched off for this address",
    )


def _not_valid_now(code: int, line: Line, seen: SeenCertificate | None, now: datetime) -> Answer:
    owner = "server's certificate"
    if seen and seen.not_before <= now <= seen.not_after:
        owner = "certificate of the federation's certificate authority"
    valid = (
        f"the server's is valid from {_time(seen.not_before)} to {_time(seen.not_after)}; " if seen else ""
    )
    renew = "flower-server renew" if owner.startswith("server") else "a new certificate authority"
    return Answer(
        state=ServerState.CERTIFICATE_EXPIRED,
        what=f"the {owner} at {line.address} {'has expired' if code == _EXPIRED else 'is not valid yet'}",
        why=f"{valid}this machine's clock says {_time(now)}",
        fix=f"if this clock is right, ask the operator to renew it ({renew}); otherwise correct the clock",
    )


def _not_tls(line: Line) -> Answer:
    if line.proxy.startswith("https://"):
        return Answer(
            state=ServerState.PROXY,
            what=f"the proxy {line.proxy_shown} does not speak TLS",
            why="https-proxy begins with https://, which asks for TLS to the proxy itself",
            fix="write http://host:port as https-proxy in hospital.toml; what goes through stays encrypted",
        )
    return Answer(
        state=ServerState.PLAINTEXT_SERVER,
        what=f"the server at {line.address} does not speak TLS",
        why="it answered in plain text (OpenSSL: wrong version number); flower-client never does",
        fix="compare the port in enrolment.toml with the operator's `listen` in federation.toml; a server or "
        "nginx of their own needs its TLS options (never --insecure)",
    )


def _proxy_refused(words: str, line: Line) -> Answer:
    hint = f"let {line.address} be allowed for CONNECT on the proxy"
    cannot_reach = words.startswith(("502", "503", "504"))
    if words.startswith("407"):
        hint = "write its user into https-proxy: http://user:password@host:port (hospital.toml stays 0600)"
    elif cannot_reach:
        hint = f"the proxy itself does not reach {line.address}: open its way out to that address"
    return Answer(
        state=ServerState.PROXY,
        what=f"the proxy {line.proxy_shown} does not connect to {line.address}",
        why=f"it answered: {words}",
        fix=hint,
        proxy_cannot_reach=cannot_reach,
    )


def _timed_out(line: Line, timeout_s: float, *, connecting: bool) -> Answer:
    there = f"the proxy {line.proxy_shown}" if line.proxy and connecting else line.address
    what = "did not take the connection" if connecting else "took the connection and did not answer"
    return Answer(
        state=ServerState.TIMEOUT,
        what=f"{there} {what} within {timeout_s:g} s",
        why="a firewall drops the packets, or the server is overloaded",
        fix=f"open the hospital's firewall for outgoing TCP to {line.address}; no inbound port is needed",
    )


def _unreachable(causes: list[BaseException], line: Line) -> Answer:
    reason = next((str(cause) for cause in reversed(causes) if isinstance(cause, OSError)), str(causes[0]))
    there = f"the proxy {line.proxy_shown}" if line.proxy else line.address
    fix = f"start the server, or open the hospital's firewall for outgoing TCP to {line.address}"
    if any(isinstance(cause, socket.gaierror | UnicodeError) for cause in causes):
        fix = (
            "check the name and this machine's DNS; an address in numbers works where the certificate has it"
        )
    elif line.proxy:
        fix = "correct https-proxy in hospital.toml (or HTTPS_PROXY), or start the proxy"
    elif any(getattr(cause, "errno", None) == errno.ENETUNREACH for cause in causes):
        fix = (
            "this machine has no way there: check its network, route or proxy (https-proxy in hospital.toml)"
        )
    return Answer(
        state=ServerState.PROXY if line.proxy else ServerState.UNREACHABLE,
        what=f"{there} cannot be reached",
        why=printable(reason),
        fix=fix,
    )


def _causes(error: BaseException) -> Iterator[BaseException]:
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        cause = cause.__cause__ or cause.__context__


def _names(seen: SeenCertificate | None) -> str:
    if seen is None:
        return "unknown"
    more = len(seen.names) - _NAMES_SHOWN
    shown = ", ".join(seen.names[:_NAMES_SHOWN]) or "none"
    return f"{shown} and {more} more" if more > 0 else shown


def _enroll_new_key(line: Line) -> str:
    patients = line.enrolled_patients
    return f"flower-server enroll {line.hospital} hospital.key.pub --patients {patients} --replace-key"


def _detail(response: httpx.Response) -> str:
    try:
        return printable(json.loads(response.text)["detail"], most=120)
    except (ValueError, KeyError, TypeError, RecursionError):
        first = response.text.strip().splitlines()
        return printable(first[0], most=120) if first else "nothing"


def _time(moment: datetime) -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
