"""The two processes that serve the hospitals: SuperLink and front, revived when they die."""

import logging
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from common.child_process import ChildProcess
from common.errors import ConfigError, FederationError
from common.flower_programs import python_module
from server.deployment.lean_environment import lean_environment
from server.deployment.probes import Answer, front_answer
from server.deployment.superlink import superlink_process, wait_until_healthy
from server.provisioning.database import tidy
from server.provisioning.operator_config import OperatorConfig, OperatorFolder, split_address

_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 30.0
_STEADY_S = 60.0
_PORT_S = 15.0
"""For the SuperLink of a server that was killed to let go of its port."""
_FRONT_S = 30.0
_STARTING_S = 60.0
"""A child that has never answered may take this long."""
_SILENCES = 3
"""Looks in a row without any answer, after which a child that lives is started anew."""

log = logging.getLogger(__name__)


@dataclass(kw_only=True)
class Kept:
    """A child that is started again when it dies, with growing pauses while it keeps dying."""

    process: ChildProcess
    pause_s: float = _FIRST_PAUSE_S
    started: float = field(default_factory=time.monotonic)
    start_at: float | None = None
    has_answered: bool = False
    silences: int = 0

    def start(self) -> None:
        """Start it."""
        self.process.start()
        self.started, self.start_at = time.monotonic(), None
        self.has_answered, self.silences = False, 0

    def heard(self, answer: Answer) -> bool:
        """Take in what it answered to a look; True when it is dead in all but name, and was ended for it."""
        if answer is not Answer.NONE:
            self.has_answered, self.silences = True, 0
            return False
        may_be_starting = not self.has_answered and time.monotonic() - self.started < _STARTING_S
        if may_be_starting or not self.process.is_running:
            return False
        self.silences += 1
        if self.silences < _SILENCES:
            return False
        self.process.kill()
        return True

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
    tidy(folder.database)
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
    while not stop() and not front_answer(folder, config).is_well:
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
        *("--state", str(folder.state), "--roster", str(folder.roster)),
        *("--max-body-mb", str(network.max_body_mb)),
        *("--max-requests", str(network.max_connections), "--hold-s", str(network.hold_s)),
    )
    environment = lean_environment(folder.flower_home)
    return ChildProcess(command, log=folder.logs / "front.log", env=environment, name="front")


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
