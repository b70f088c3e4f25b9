"""What came of asking the server, and over which line it was asked."""

import urllib.request
from dataclasses import dataclass
from datetime import UTC, datetime
from enum import StrEnum

from common.enrolment import Enrolment
from common.errors import FederationError, printable


class ServerState(StrEnum):
    """How the question ended."""

    READY = "ready"
    """The key is enrolled and no session of it is online: a client can start now."""
    ONLINE = "online"
    """The key is enrolled and a session of it is online: ours, an old one, or somebody else's."""
    NOT_ENROLLED = "not-enrolled"
    """The server does not know this key, and the enrolment was for another one."""
    REVOKED = "revoked"
    """The server does not know this key any more (or not yet), although the enrolment is for it."""
    UNREACHABLE = "unreachable"
    TIMEOUT = "timeout"
    PLAINTEXT_SERVER = "plaintext-server"
    CA_WRONG = "wrong-certificate-authority"
    NAME_WRONG = "wrong-name"
    CERTIFICATE_EXPIRED = "certificate-expired"
    """Also a certificate that is not valid yet."""
    CLOCK = "clock"
    BUSY = "busy"
    """The server asks to come back later."""
    PROXY = "proxy"
    OTHER = "other"


_AWAY = frozenset({ServerState.UNREACHABLE, ServerState.TIMEOUT, ServerState.BUSY})

_FOR_A_PERSON = frozenset(
    {
        ServerState.NOT_ENROLLED,
        ServerState.REVOKED,
        ServerState.PLAINTEXT_SERVER,
        ServerState.CA_WRONG,
        ServerState.NAME_WRONG,
        ServerState.CERTIFICATE_EXPIRED,
        ServerState.CLOCK,
    }
)


@dataclass(frozen=True, kw_only=True)
class Line:
    """Who asks whom, and by which way."""

    federation: str
    hospital: str
    enrolled_patients: int
    address: str
    """host:port of the server."""
    fingerprint: str
    """Of the key that signs."""
    enrolled_fingerprint: str
    """Of the key that the operator has enrolled."""
    proxy: str
    """URL of the HTTP proxy; empty goes straight."""

    @classmethod
    def of(cls, enrolment: Enrolment, *, https_proxy: str, fingerprint: str) -> "Line":
        """The line to the server of `enrolment`; an empty proxy means the environment's."""
        return cls(
            federation=enrolment.federation,
            hospital=enrolment.hospital,
            enrolled_patients=enrolment.enrolled_patients,
            address=enrolment.address,
            fingerprint=fingerprint,
            enrolled_fingerprint=enrolment.fingerprint,
            proxy=https_proxy or proxy_of_environment(enrolment.address),
        )

    @property
    def host(self) -> str:
        """Name or IP of the server, without brackets."""
        return self.address.rpartition(":")[0].strip("[]")

    @property
    def proxy_shown(self) -> str:
        """The proxy without user and password."""
        return without_password(self.proxy)


def without_password(proxy: str) -> str:
    """A proxy's address as it may be shown: what stands before the last '@' is left out.

    >>> without_password("http://doctor:secret@proxy.example:3128")
    'http://proxy.example:3128'
    """
    shown = proxy.rpartition("@")[2]
    scheme, is_url, _ = proxy.partition("://")
    return printable(f"{scheme}://{shown}" if is_url and shown != proxy else shown)


def proxy_of_environment(address: str) -> str:
    """HTTPS_PROXY (or ALL_PROXY) for this host:port; empty without one or where NO_PROXY names the host."""
    host = address.rpartition(":")[0].strip("[]")
    if urllib.request.proxy_bypass(host):
        return ""
    proxies = urllib.request.getproxies()
    proxy = proxies.get("https") or proxies.get("all") or ""
    return proxy if "://" in proxy or not proxy else f"http://{proxy}"


@dataclass(frozen=True, kw_only=True)
class Answer:
    """How it went, for a person in three lines, and what the server said of itself."""

    state: ServerState
    what: str
    why: str = ""
    fix: str = ""
    address: str = ""
    """host:port that was asked."""
    proxy_cannot_reach: bool = False
    """Whether the hospital's proxy works and says that it does not reach the server."""
    server_release: str = ""
    """Release of hospital-federation at the server; empty when it did not say."""
    server_schema: int | None = None
    """Its wire schema."""
    server_bundle: str = ""
    """SHA-256 of the bundle that it submits."""
    clock_skew_s: float | None = None
    """Seconds by which this machine's clock is ahead of the server's, to about a second."""
    certificate_until: datetime | None = None
    """End of the server certificate's validity."""

    @property
    def is_enrolled(self) -> bool:
        """Whether the server knows this key."""
        return self.state in {ServerState.READY, ServerState.ONLINE}

    @property
    def needs_a_person(self) -> bool:
        """Whether asking again cannot help before somebody has changed something."""
        return self.state in _FOR_A_PERSON

    @property
    def is_away(self) -> bool:
        """Whether it may well be the server that is not there, rather than something at the hospital."""
        return self.state in _AWAY or self.proxy_cannot_reach

    @property
    def certificate_days_left(self) -> float | None:
        """Days until the server's certificate expires, None where it was not seen."""
        if self.certificate_until is None:
            return None
        return (self.certificate_until - datetime.now(UTC)).total_seconds() / 86_400

    def text(self, *, was_connected: bool = False) -> str:
        """The three lines; a hospital that was connected before is not told to open its firewall."""
        return str(self.as_error(was_connected=was_connected))

    def as_error(self, *, was_connected: bool = False) -> FederationError:
        """The same as an error to raise."""
        if was_connected and self.is_away:
            return FederationError(
                f"the server at {self.address} has gone" if self.address else "the server has gone",
                why="it has ended its run, restarts, or the line is cut; this hospital was connected before, "
                "so its firewall is right",
                fix="nothing is to be done: this client waits and connects by itself",
            )
        return FederationError(self.what, why=self.why, fix=self.fix)
