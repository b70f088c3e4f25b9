"""The operator's folder: `federation.toml`, with the network beside the plan, and all other paths."""

import ipaddress
import re
from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from common.config import FederationConfig
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.names import ADDRESS
from common.settings import Section, load

FEDERATION = "federation.toml"
_HOST = re.compile(r"[A-Za-z0-9]([A-Za-z0-9._-]*[A-Za-z0-9])?")


class NetworkSection(Section):
    """How hospitals reach the server; only the Fleet path over TLS is open, everything else is loopback."""

    address: str = Field(pattern=ADDRESS)
    """host:port under which hospitals reach the server, as they type it (a name, or an IP address)."""
    listen: str = Field(default="0.0.0.0:8443", pattern=ADDRESS)
    """host:port of this machine on which the open path listens; 0.0.0.0 is every IPv4 interface."""
    superlink_port: int = Field(default=8000, ge=1, le=65535)
    """Port of Flower's SuperLink on 127.0.0.1; never open it to the outside."""
    health_port: int = Field(default=8001, ge=1, le=65535)
    """Port on 127.0.0.1 that answers gRPC health."""
    names: tuple[str, ...] = Field(default=(), max_length=50)
    """Further names or IP addresses of the server certificate, beside the address, 127.0.0.1, localhost."""
    max_body_mb: int = Field(default=16, ge=6, le=2047)
    """Largest request in MiB; Flower sends objects in pieces of 5 MiB."""
    max_connections: int = Field(default=400, ge=2, le=100_000)
    """Requests that may be open at once; one more is answered with 503 and comes again."""
    hold_s: float = Field(default=20.0, ge=0, le=25)
    """Seconds that a hospital's empty pull is held open for a message; its own limit is 30 s."""

    @model_validator(mode="after")
    def _ports_and_names_are_usable(self) -> Self:
        for key, value in (("address", self.address), ("listen", self.listen)):
            if not 1 <= split_address(value)[1] <= 65535:
                raise ValueError(f"{key} = {value!r} names no port between 1 and 65535")
        ports = (split_address(self.listen)[1], self.superlink_port, self.health_port)
        if len(set(ports)) < len(ports):
            raise ValueError(f"listen, superlink-port and health-port need three ports, got {ports}")
        for name in (split_address(self.address)[0], *self.names):
            if not _is_ip(name) and not _HOST.fullmatch(name):
                raise ValueError(f"{name!r} is neither a host name nor an IP address")
        return self

    @property
    def certificate_names(self) -> tuple[str, ...]:
        """Names and IP addresses that the server certificate must hold, the public one first."""
        public = split_address(self.address)[0]
        names = (public, "localhost", "127.0.0.1", *self.names)
        return tuple(dict.fromkeys(_as_in_certificates(name) for name in names))


class OperatorConfig(FederationConfig):
    """The operator's `federation.toml`: the federation's settings and the network."""

    network: NetworkSection


class OperatorFolder:
    """Paths of one federation at the operator; nothing is read or made before it is asked for."""

    def __init__(self, path: Path) -> None:
        self.path = path.absolute()
        self.federation_toml = self.path / FEDERATION
        self.roster = self.path / "roster.json"
        self.ca_key = self.path / "ca" / "ca.key"
        self.ca_certificate = self.path / "ca" / "ca.crt"
        self.server_key = self.path / "tls" / "server.key"
        self.server_certificate = self.path / "tls" / "server.crt"
        self.superexec_secret = self.path / "secrets" / "superexec.bin"
        self.enrolments = self.path / "enrolments"
        self.runs = self.path / "runs"
        self.receipts = self.path / "receipts"
        self.state = self.path / "state"
        self.database = self.state / "superlink.db"
        self.server_json = self.state / "server.json"
        self.current_run = self.state / "current-run"
        self.lock = self.state / ".lock"
        self.flower_home = self.state / "flower"
        self.logs = self.path / "logs"
        self.superlink_log = self.logs / "superlink.log"
        self.federation_log = self.logs / "federation.log"

    def config(self) -> OperatorConfig:
        """Read federation.toml. Raises ConfigError, also when this is no operator's folder."""
        if not self.federation_toml.is_file():
            raise ConfigError(
                f"{self.path} is not the folder of a federation",
                why=f"there is no {FEDERATION} in it",
                fix="go to that folder, or name it; make a new one with flower-server init",
            )
        return load(OperatorConfig, self.federation_toml)

    @property
    def secrets(self) -> tuple[Path, ...]:
        """Files that only the operator may read."""
        return (self.ca_key, self.server_key, self.superexec_secret)

    def run_folder(self) -> Path | None:
        """Folder of the current run, named in `state/current-run` (relative to this folder); None without."""
        try:
            named = self.current_run.read_text().strip()
        except FileNotFoundError:
            return None
        return self.path / named if named else None

    def remember_run(self, run: Path) -> None:
        """Make `run` the current run; below this folder its path is kept relative, so that DIR can move."""
        path = run if run.is_absolute() else self.path / run
        named = path.relative_to(self.path) if path.is_relative_to(self.path) else path
        write_bytes_atomically(self.current_run, f"{named}\n".encode())


def split_address(address: str) -> tuple[str, int]:
    """Host (an IPv6 address without its brackets) and port of `host:port`."""
    host, _, port = address.rpartition(":")
    return host.strip("[]"), int(port)


def _as_in_certificates(name: str) -> str:
    return str(ipaddress.ip_address(name)) if _is_ip(name) else name


def _is_ip(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True
