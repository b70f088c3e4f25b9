"""The two processes that serve the hospitals: SuperLink and front, revived when they die."""

import logging
import socket
import ssl
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common.child_process import ChildProcess
from common.errors import ConfigError, FederationError
from common.flower_programs import flower_environment, python_module
from server.deployment.superlink import is_healthy, superlink_process, wait_until_healthy
from server.provisioning.operator_config import OperatorConfig, OperatorFolder, split_address

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STEADY_S = 60.0
_PORT_S = 15.0
"""For the SuperLink of a server that was killed to let go of its port."""
_FRONT_S = 30.0

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Kept:
    """A child that is started again when it dies, with growing pauses while it keeps dying."""

    process: ChildProcess
    pause_s: float = _FIRST_PAUSE_S
    started: float = field(default_factory=time.monotonic)
    start_at: float | None = None

    def start(self) -> None:
        """Start it."""
        self.process.start()
        self.started, self.start_at = time.monotonic(), None

    def revive(self) -> bool:
        """Start it again if it is dead and its pause is over; True when that was done now."""
        now = time.monotonic()
        if self.process.is_running:
            if now - self.started > _STEADY_S:
                self.pause_s = _FIRST_PAUSE_S
            return False
        if self.start_at is None:
            log.warning("%s ended with status %s", self.process.name, self.process.poll())
            self.start_at = now + self.pause_s
            self.pause_s = min(_LONGEST_PAUSE_S, 2 * self.pause_s)
        if now < self.start_at:
            return False
        self.start()
        return True


def start_superlink(folder: OperatorFolder, config: OperatorConfig, *, stop: Callable[[], bool]) -> Kept:
    """Start the SuperLink and wait for it. Raises FederationError, ConfigError."""
    wait_for_port("127.0.0.1", config.network.superlink_port, key="superlink-port", stop=stop)
    kept = Kept(process=superlink_process(folder, config))
    kept.start()
    try:
        wait_until_healthy(kept.process, folder, config, stop=stop)
    except BaseException:
        kept.process.stop()
        raise
    return kept


def start_front(folder: OperatorFolder, config: OperatorConfig, *, stop: Callable[[], bool]) -> Kept:
    """Open the door to the hospitals and wait until it answers. Raises FederationError, ConfigError."""
    host, port = split_address(config.network.listen)
    wait_for_port(host, port, key="listen", stop=stop)
    kept = Kept(process=front_process(folder, config))
    kept.start()
    give_up_at = time.monotonic() + _FRONT_S
    while not stop() and not front_answers(folder, config):
        if kept.process.poll() is not None or time.monotonic() > give_up_at:
            said = "; ".join(line for line in kept.process.last_lines(3) if line.strip())
            kept.process.stop()
            raise FederationError(
                f"the open path on {config.network.listen} does not answer",
                why=said[-300:] or "it said nothing",
                fix=f"look at {kept.process.log}; check with: flower-server check",
            )
        time.sleep(0.05)
    return kept


def front_process(folder: OperatorFolder, config: OperatorConfig) -> ChildProcess:
    """The front of this federation, not yet started."""
    network = config.network
    command = python_module(
        "server.deployment.front_process",
        *("--listen", network.listen, "--upstream", f"127.0.0.1:{network.superlink_port}"),
        *("--authority", str(folder.ca_certificate)),
        *("--certificate", str(folder.server_certificate), "--key", str(folder.server_key)),
        *("--state", str(folder.state), "--max-body-mb", str(network.max_body_mb)),
        *("--max-requests", str(network.max_connections), "--hold-s", str(network.hold_s)),
    )
    environment = flower_environment(folder.flower_home)
    return ChildProcess(command, log=folder.logs / "front.log", env=environment, name="front")


def front_answers(folder: OperatorFolder, config: OperatorConfig, *, timeout_s: float = 2.0) -> bool:
    """Whether the door is open: a TLS handshake from this machine succeeds."""
    host, port = split_address(config.network.listen)
    context = ssl.create_default_context(cafile=str(folder.ca_certificate))
    context.check_hostname = False  # it listens on every address, and the certificate holds the public name
    here = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)
    try:
        with (
            socket.create_connection((here, port), timeout=timeout_s) as plain,
            context.wrap_socket(plain),
        ):
            return True
    except OSError:
        return False


def superlink_answers(folder: OperatorFolder, config: OperatorConfig) -> bool:
    """Whether the SuperLink answers its health path."""
    return is_healthy(folder, config)


def wait_for_port(host: str, port: int, *, key: str, stop: Callable[[], bool]) -> None:
    """Return when the port can be bound. Raises ConfigError when it stays taken."""
    give_up_at = time.monotonic() + _PORT_S
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    while not stop():
        with socket.socket(family) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((host, port))
                return
            except OSError as error:
                if time.monotonic() > give_up_at:
                    raise ConfigError(
                        f"port {port} on {host} cannot be used",
                        why=error.strerror or "it is taken",
                        fix=f"end the program that has it, or set another network.{key} in federation.toml",
                    ) from None
        time.sleep(0.2)
