"""Checks of the operator's machine: clock, ports, disk, memory, and the state of Flower's database."""

import datetime
from collections.abc import Iterator

from common.checks import Check, CheckState
from common.health import Health, ask_health
from common.machine import (
    PortState,
    free_disk_mb,
    free_memory_mb,
    is_clock_synchronised,
    is_locked,
    port_state,
)
from server.provisioning.certificates import begins_at
from server.provisioning.database import DatabaseState, database_state
from server.provisioning.operator_config import OperatorConfig, OperatorFolder, split_address

_DISK_MB, _ENOUGH_DISK_MB = 500.0, 5_000.0
_MEMORY_MB, _ENOUGH_MEMORY_MB = 500.0, 1_500.0
_CLOCK_SLACK_S = 60.0


def check_clock(folder: OperatorFolder) -> Iterator[Check]:
    """Not before what was written here, and steered by a time service."""
    now = datetime.datetime.now(datetime.UTC)
    newest = max(path.stat().st_mtime for path in (folder.federation_toml, folder.roster) if path.exists())
    behind_s = max(newest - now.timestamp(), (begins_at(folder.server_certificate) - now).total_seconds())
    shown = f"{now.isoformat(timespec='seconds')}"
    fix = "switch on a time service (chrony, systemd-timesyncd); hospitals may be 5 s ahead or 305 s behind"
    if behind_s > _CLOCK_SLACK_S:
        result = f"{shown} is {behind_s:.0f} s before the newest file or certificate here: the clock is wrong"
        yield Check(name="clock", state=CheckState.FAILED, result=result, fix=fix)
    elif (steered := is_clock_synchronised()) is False:
        result = f"{shown}; this machine does not say that a time service steers its clock"
        yield Check(name="clock", state=CheckState.WARNING, result=result, fix=fix)
    else:
        how = ", steered by a time service" if steered else ""
        yield Check(name="clock", state=CheckState.OK, result=shown + how)


def check_ports(folder: OperatorFolder, config: OperatorConfig) -> Iterator[Check]:
    """Free, or held by this federation's own running server."""
    network = config.network
    runs = is_locked(folder.lock)
    ports = (
        ("listen", *split_address(network.listen)),
        ("superlink-port", "127.0.0.1", network.superlink_port),
        ("health-port", "127.0.0.1", network.health_port),
    )
    if runs:
        healthy = ask_health(network.health_port) is Health.SERVING
        state = CheckState.OK if healthy else CheckState.WARNING
        result = "this federation's server is running" + (
            "" if healthy else ", but does not say that it is well"
        )
        yield Check(name="ports", state=state, result=result, fix="" if healthy else "flower-server status")
        return
    for key, host, port in ports:
        yield _port(key, host, port)


def _port(key: str, host: str, port: int) -> Check:
    what, where = port_state(host, port), f"{host}:{port}"
    fixes = {
        PortState.TAKEN: f"another program has it (ss -ltnp 'sport = :{port}'): end it, or change {key}",
        PortState.NOT_ALLOWED: f"a port below 1024 needs a privilege: use one above; change {key}",
        PortState.NO_SUCH_ADDRESS: f"this machine has no address {host}: change {key} in [network]",
    }
    state = CheckState.OK if what is PortState.FREE else CheckState.FAILED
    return Check(
        name=f"port {port}", state=state, result=f"{where} ({key}): {what.value}", fix=fixes.get(what, "")
    )


def check_disk(folder: OperatorFolder) -> Iterator[Check]:
    """Space for checkpoints, database and logs."""
    yield _amount(
        "disk", free_disk_mb(folder.path), _DISK_MB, _ENOUGH_DISK_MB, "free space, or move the folder"
    )


def check_memory() -> Iterator[Check]:
    """Enough for SuperLink, ServerApp and open path."""
    free = free_memory_mb()
    if free is not None:
        yield _amount(
            "memory", free, _MEMORY_MB, _ENOUGH_MEMORY_MB, "end other programs, or use a larger machine"
        )


def _amount(name: str, free_mb: float, needed_mb: float, enough_mb: float, fix: str) -> Check:
    state = CheckState.OK if free_mb >= enough_mb else CheckState.WARNING
    if free_mb < needed_mb:
        state = CheckState.FAILED
    result = f"{free_mb / 1000:.1f} GB free" + (
        "" if state is CheckState.OK else f", want {enough_mb / 1000:.1f}"
    )
    return Check(name=name, state=state, result=result, fix="" if state is CheckState.OK else fix)


def check_database(folder: OperatorFolder) -> Iterator[Check]:
    """Whether the installed Flower can go on with its database."""
    found = database_state(folder.database)
    state, fix = CheckState.OK, ""
    if found is DatabaseState.OLDER:
        state, fix = CheckState.WARNING, "make a backup before the next start: flower-server backup"
    elif found in (DatabaseState.UNKNOWN, DatabaseState.DAMAGED):
        state = CheckState.FAILED
        fix = f"move {folder.database} away (runs go on without it), or use the Flower that wrote it"
    yield Check(name="database", state=state, result=found.value, fix=fix)
