"""One question to the server: is this key known, and could a session begin now.

The question is Flower's own ActivateNode, signed with the key, always over TLS that only the federation's
certificate authority can vouch for. An accepted activation is taken back at once. A hospital that is online
gets ONLINE and nothing changes for it.
"""

import re
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Any

import httpx
from cryptography.hazmat.primitives.asymmetric import ec
from flwr.proto.fleet_pb2 import ActivateNodeRequest, ActivateNodeResponse, DeactivateNodeRequest
from flwr.supercore.protobuf.client import ProtobufRequestContext
from flwr.supercore.runtime_version_compatibility import RuntimeVersionMetadata
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor
from google.protobuf.message import DecodeError, Message

from client.connection_faults import (
    clock_refused,
    explain_failure,
    explain_status,
    is_online,
    is_other_flower,
    not_enrolled,
    other_flower,
)
from client.server_answer import Answer, Line, ServerState
from client.server_certificate import CertificateWatch, tls_context
from common.enrolment import Enrolment
from common.errors import ConfigError
from common.node_keys import public_key_of

_HEARTBEAT_S = 10.0
"""Flower's shortest interval: should the taking back be lost, the server forgets the session after 20 s."""
_IMPOSSIBLE_HEARTBEAT_S = 0.0
"""Flower looks for the key before it refuses this interval: it tells whether the key is known, no more."""
_ACTIVATE, _DEACTIVATE = "ActivateNode", "DeactivateNode"
_PATHS = {_ACTIVATE: "/v1/fleet/activate-node", _DEACTIVATE: "/v1/fleet/deactivate-node"}
_MEDIA_TYPE = "application/protobuf"
_RELEASE, _SCHEMA = re.compile(r"[\w.+-]{1,32}", re.ASCII), re.compile(r"[0-9]{1,6}")
_BUNDLE = re.compile(r"[0-9a-f]{64}")
_POSSIBLE_YEARS = range(1970, 9000)


def ask_server(
    enrolment: Enrolment,
    key: ec.EllipticCurvePrivateKey,
    *,
    https_proxy: str = "",
    timeout_s: float = 10.0,
) -> Answer:
    """Ask once and say how it went; a fault of the network, of TLS or of the server is an answer.

    `timeout_s` bounds each of connecting, sending and waiting. Without `https_proxy` the environment's
    HTTPS_PROXY and NO_PROXY hold. Raises ConfigError for a proxy or certificate authority that is none.
    """
    line = Line.of(enrolment, https_proxy=https_proxy, fingerprint=public_key_of(key).fingerprint)
    watch = CertificateWatch()
    try:
        client = httpx.Client(
            base_url=f"https://{enrolment.address}",
            verify=tls_context(enrolment.ca_certificate),
            proxy=line.proxy or None,
            trust_env=False,
            timeout=timeout_s,
        )
    except (ValueError, httpx.InvalidURL):
        raise _unusable(line) from None
    with client:
        try:
            answer = _ask(_Signed(client, key, watch), public_key_of(key).pem, line)
        except (httpx.HTTPError, ValueError) as error:  # ValueError: a name that no DNS takes
            answer = explain_failure(error, line, timeout_s=timeout_s, now=_now())
    return replace(answer, address=line.address, certificate_until=watch.not_after)


def _unusable(line: Line) -> ConfigError:
    """The client could not be made; the library's words may hold the proxy's password."""
    if not line.proxy:
        return ConfigError(
            f"the server's address {line.address} cannot be used",
            why="it is no host:port",
            fix="compare the address in enrolment.toml with the operator's",
        )
    return ConfigError(
        f"https-proxy = {line.proxy_shown!r} cannot be used",
        why="it is not the address of an HTTP proxy",
        fix="write http://host:port, for example http://proxy.hospital.example:3128; "
        "special characters of a password as %XX",
    )


class _Signed:
    """Sends Fleet requests with this hospital's signature and Flower's version.

    Not with Flower's own interceptor for versions: it logs what the server writes into a header, and ends the
    process when a reply says so.
    """

    def __init__(
        self, client: httpx.Client, key: ec.EllipticCurvePrivateKey, watch: CertificateWatch
    ) -> None:
        self._client, self._watch = client, watch
        self._signature = NodeAuthHttpInterceptor(key, key.public_key())
        self._version = dict(RuntimeVersionMetadata.from_local_component("SuperNode").as_metadata())

    def post(self, method: str, message: Message) -> httpx.Response:
        request = self._client.build_request(
            "POST",
            _PATHS[method],
            content=message.SerializeToString(deterministic=True),
            headers={"content-type": _MEDIA_TYPE, "accept": _MEDIA_TYPE, **self._version},
            extensions={"trace": self._watch},
        )
        context = ProtobufRequestContext(
            rpc_method=f"/flwr.proto.Fleet/{method}", message=message, request=request
        )
        return self._signature.intercept(context, lambda signed: self._client.send(signed.request))


def _ask(signed: _Signed, public_key: bytes, line: Line) -> Answer:
    asked_at = time.monotonic()
    response = signed.post(
        _ACTIVATE, ActivateNodeRequest(public_key=public_key, heartbeat_interval=_HEARTBEAT_S)
    )
    half_way = (time.monotonic() - asked_at) / 2
    skew_s = clock_skew_s(response.headers, now=_now(), age_s=half_way)
    if response.status_code == httpx.codes.OK:
        answer = _take_back(signed, response, line)
    elif is_other_flower(response):
        answer = other_flower(response, line)
    elif response.status_code == httpx.codes.PRECONDITION_FAILED:
        answer = _known_or_not(signed, public_key, line)
    elif response.status_code == httpx.codes.UNAUTHORIZED and skew_s is not None:
        answer = clock_refused(line, now=_now(), skew_s=skew_s, response=response)
    else:
        answer = explain_status(response, line)
    return replace(answer, clock_skew_s=skew_s, **_announced(response.headers))


def _take_back(signed: _Signed, response: httpx.Response, line: Line) -> Answer:
    activated = ActivateNodeResponse()
    try:
        activated.ParseFromString(response.content)
    except DecodeError:
        activated.node_id = 0
    if not activated.node_id:  # a page of something else, that says 200 to everything
        return explain_status(response, line)
    with suppress(httpx.HTTPError):  # the session expires by itself
        signed.post(_DEACTIVATE, DeactivateNodeRequest(node_id=activated.node_id))
    return Answer(state=ServerState.READY, what=f"{line.federation} at {line.address} knows this key")


def _known_or_not(signed: _Signed, public_key: bytes, line: Line) -> Answer:
    """412 means an unknown key or a session that is online; an impossible interval tells which."""
    request = ActivateNodeRequest(public_key=public_key, heartbeat_interval=_IMPOSSIBLE_HEARTBEAT_S)
    response = signed.post(_ACTIVATE, request)
    if response.status_code == httpx.codes.BAD_REQUEST:
        return is_online(line)
    if response.status_code == httpx.codes.PRECONDITION_FAILED:
        return not_enrolled(line)
    return explain_status(response, line)


def clock_skew_s(headers: Mapping[str, str], *, now: datetime, age_s: float = 0.0) -> float | None:
    """Seconds by which this machine's clock is ahead of the server's (Date header, to half a second)."""
    try:
        server = parsedate_to_datetime(headers["date"])
    except (LookupError, ValueError, TypeError, ArithmeticError):  # whatever a server writes there
        return None
    if server.tzinfo is None or server.year not in _POSSIBLE_YEARS:
        return None
    return round((now - server).total_seconds() - 0.5 - age_s, 1)


def _announced(headers: Mapping[str, str]) -> dict[str, Any]:
    """What our front says of itself: `<release>;schema=<n>;bundle=<sha256>`; nothing where it is another.

    A part that has not exactly this form is empty: the digest ends up in a command that a person copies.
    """
    release, *rest = headers.get("x-hospital-federation", "").split(";")
    named = dict(part.strip().split("=", 1) for part in rest if "=" in part)
    schema = _only(_SCHEMA, named.get("schema", ""))
    return {
        "server_release": _only(_RELEASE, release.strip()),
        "server_schema": int(schema) if schema else None,
        "server_bundle": _only(_BUNDLE, named.get("bundle", "")),
    }


def _only(form: re.Pattern[str], text: str) -> str:
    """The text where all of it has this form, otherwise nothing."""
    return text if form.fullmatch(text) else ""


def _now() -> datetime:
    return datetime.now(UTC)
