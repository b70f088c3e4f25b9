"""Flower's SuperNode: the only process that speaks to the federation's server, outward and over TLS.

It runs in `client.deployment.supernode_process`, with two guards, and executes nothing (process isolation):
tasks wait in it for the worker, behind a secret and over TLS, on loopback.
"""

import os
import re
import socket
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

from client.deployment.hospital_folder import HospitalFolder
from client.server_answer import without_password
from common.child_process import ChildProcess
from common.enrolment import Enrolment
from common.errors import ConfigError, FederationError
from common.flower_programs import flower_environment, python_module, without_proxy_on_loopback

_PROXY_NAMES = ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")
_TELLS_ITS_ID = re.compile(rb"SuperNode ID: (\d{1,20})\s")
"""What Flower logs once the server has let it in."""
_GIVES_UP = "Giving up reconnection"
_HAS_ONE, _GOES_ON = b"Received successfully", (b"Sending: ", b"Receiving: ", b"Starting Flower SuperNode")
_TAIL = 16384


class SuperNode:
    """One SuperNode after the other, started and stopped by the supervisor."""

    def __init__(self, folder: HospitalFolder, enrolment: Enrolment) -> None:
        self._port = folder.config.connection.runtime_port
        self._process = ChildProcess(
            supernode_command(folder, enrolment),
            log=folder.logs / "supernode.log",
            env=supernode_environment(folder, os.environ),
            name="SuperNode",
        )
        self._log_began = 0
        self.started = 0.0
        """`time.monotonic` of the last start."""
        self.starts = 0

    @property
    def pid(self) -> int:
        """Process id of the last one."""
        return self._process.pid

    @property
    def is_running(self) -> bool:
        """Whether its process lives; says nothing about whether it works."""
        return self._process.is_running

    def start(self) -> None:
        """Start it. Raises FederationError when its port on loopback is taken; OSError without a log."""
        refuse_taken_port(self._port, key="runtime-port")
        log = self._process.log
        before = log.stat().st_size if log.exists() else 0
        self._process.start()
        self._log_began = before if log.stat().st_size >= before else 0  # begun anew when it was too long
        self.started, self.starts = time.monotonic(), self.starts + 1

    def bound_log(self) -> None:
        """Keep its log from growing for ever."""
        self._process.bound_log()

    def node_id(self) -> int | None:
        """The id that the server gave it since its last start; None as long as it was not let in."""
        try:
            with self._process.log.open("rb") as log:
                log.seek(self._log_began)
                found = _TELLS_ITS_ID.search(log.read(1_000_000))
        except OSError:
            return None
        return int(found.group(1)) if found else None

    def gave_up(self) -> bool:
        """Whether its last words are that it tries no more: a TLS handshake that times out is final to it."""
        return any(_GIVES_UP in line for line in self._process.last_lines(4))

    def awaits_an_answer(self) -> bool:
        """Whether its last words are that it has a message for the worker."""
        try:
            with self._process.log.open("rb") as log:
                log.seek(max(0, log.seek(0, os.SEEK_END) - _TAIL))
                said = log.read(_TAIL)
        except OSError:
            return False
        return said.rfind(_HAS_ONE) > max(map(said.rfind, _GOES_ON))

    def stop(self) -> bool:
        """End the session at the server, then the process, by force if it does not react.

        Whether it ended by itself, and with it the session; False also when it had been killed before.
        """
        self._process.stop(patience_s=8.0)
        return self.starts > 0 and (self._process.poll() or 0) >= 0


def supernode_command(folder: HospitalFolder, enrolment: Enrolment) -> list[str]:
    """The command line. No secret stands in it, and never `--insecure`."""
    return [
        *python_module("client.deployment.supernode_process"),
        *("--superlink", enrolment.address),
        *("--root-certificates", str(folder.ca_file)),
        *("--auth-supernode-private-key", str(folder.key_in_use)),
        *("--isolation", "process"),
        *("--superexec-auth-secret-file", str(folder.secret_file)),
        *("--ssl-certfile", str(folder.runtime_certificate)),
        *("--ssl-keyfile", str(folder.runtime_key)),
        *("--ssl-ca-certfile", str(folder.runtime_certificate)),
        *("--host", "127.0.0.1"),
        *("--port", str(folder.config.connection.runtime_port)),
    ]


def supernode_environment(folder: HospitalFolder, environment: Mapping[str, str]) -> dict[str, str]:
    """Flower's environment; with `https-proxy` set, everything but loopback goes through that proxy."""
    flower = {**environment, **flower_environment(folder.flower_home)}
    if proxy := folder.config.connection.https_proxy:
        if urlsplit(proxy).scheme not in ("http", "https"):
            raise ConfigError(
                f"https-proxy = {without_password(proxy)!r} cannot be used",
                fix="write http://host:port, or leave it empty",
            )
        flower |= dict.fromkeys(_PROXY_NAMES, proxy)
        flower |= {"NO_PROXY": "", "no_proxy": ""}  # what is configured here holds, whatever the shell says
    return without_proxy_on_loopback(flower)


def refuse_taken_port(port: int, *, key: str) -> None:
    """Raise FederationError when another program has this port of loopback; it may be free again later."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError as error:
            raise FederationError(
                f"port {port} on 127.0.0.1 cannot be used",
                why=error.strerror or "another program has it",
                fix=f"end the program that has it, or write another [connection] {key} into hospital.toml",
            ) from None
