"""Flower's own SuperLink as a child process on loopback, and why it did not start, in words."""

import time
from collections.abc import Callable

from common.child_process import ChildProcess
from common.errors import ConfigError, FederationError
from common.flower_programs import python_module
from server.deployment.lean_environment import lean_environment
from server.deployment.probes import superlink_answer
from server.provisioning.operator_config import OperatorConfig, OperatorFolder

_START_S = 60.0


def superlink_process(folder: OperatorFolder, config: OperatorConfig) -> ChildProcess:
    """The SuperLink of this federation, not yet started."""
    command = [
        *python_module("server.deployment.superlink_process"),
        *("--host", "127.0.0.1", "--port", str(config.network.superlink_port)),
        *("--ssl-ca-certfile", str(folder.ca_certificate)),
        *("--ssl-certfile", str(folder.server_certificate), "--ssl-keyfile", str(folder.server_key)),
        *("--enable-supernode-auth", "--database", str(folder.database)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(folder.superexec_secret)),
        "--disable-runtime-dependency-installation",
    ]
    folder.flower_home.mkdir(parents=True, exist_ok=True, mode=0o700)
    environment = lean_environment(folder.flower_home, FLWR_LOG_LEVEL="WARNING")
    return ChildProcess(command, log=folder.superlink_log, env=environment, name="superlink")


def wait_until_healthy(
    process: ChildProcess, folder: OperatorFolder, config: OperatorConfig, *, stop: Callable[[], bool]
) -> None:
    """Return when it answers, or when `stop()`. Raises FederationError that says why it does not."""
    give_up_at = time.monotonic() + _START_S
    while not stop():
        if process.poll() is not None:
            raise why_it_ended(process, config)
        if superlink_answer(folder, config).is_well:
            return
        if time.monotonic() >= give_up_at:
            raise FederationError(
                f"the SuperLink does not answer after {_START_S:.0f} s",
                why="it runs but is not ready" + _last_line(process),
                fix=f"look at {process.log}; check the certificate with: flower-server check",
            )
        time.sleep(0.1)


def why_it_ended(process: ChildProcess, config: OperatorConfig) -> FederationError:
    """What its last words mean."""
    said = "\n".join(process.last_lines(40))
    port = config.network.superlink_port
    if "Exit Code: 105" in said:
        return ConfigError(
            "the database of the federation is of another release of Flower",
            why="its schema does not fit (Flower's exit code 105)",
            fix="install the release that wrote it, or restore a backup; the runs themselves are not in it",
        )
    if "address already in use" in said or "Errno 98" in said:
        return ConfigError(
            f"port {port} on 127.0.0.1 is in use",
            why="another program, perhaps another federation, has it",
            fix="end that program, or set another network.superlink-port in federation.toml",
        )
    if "No space left" in said or "disk is full" in said:
        return FederationError(
            "the SuperLink cannot write its database",
            why="the disk is full",
            fix="free disk space, start again",
        )
    if "malformed" in said or "not a database" in said:
        return FederationError(
            "the database of the federation is damaged",
            why="SQLite cannot read state/superlink.db",
            fix="move it away (the hospitals are enrolled anew from the roster), or restore a backup",
        )
    return FederationError(
        f"the SuperLink ended with status {process.poll()}",
        why=_last_line(process).removeprefix(": ") or "it said nothing",
        fix=f"look at {process.log}",
    )


def _last_line(process: ChildProcess) -> str:
    lines = [line.strip() for line in process.last_lines(5) if line.strip()]
    return f": {lines[-1][:300]}" if lines else ""
