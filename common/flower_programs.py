"""Flower's own programs and their environment: nothing is sent anywhere, nothing is installed."""

import contextlib
import os
import shutil
import socket
import sys
from collections.abc import Mapping
from pathlib import Path

from common.errors import ConfigError

ROOT = Path(__file__).resolve().parents[1]
"""Folder that holds the packages, wherever they are installed."""
PIECE_BYTES = 2 * 2**20
"""Of a model on its way; whoever passes a piece on holds it several times. Flower's own are of 5 MiB."""


def program(name: str) -> str:
    """A command that belongs to this interpreter; raises ConfigError when it is missing."""
    beside = Path(sys.executable).parent / name
    found = str(beside) if beside.exists() else shutil.which(name)
    if not found:
        raise ConfigError(
            f"Flower's command {name} is not installed beside this Python", fix="reinstall flwr"
        )
    return found


def python_module(module: str, *arguments: str) -> list[str]:
    """Command line of a module of ours under this interpreter."""
    return [sys.executable, "-m", module, *arguments]


def flower_environment(home: Path, **extra: str) -> dict[str, str]:
    """Environment of Flower's processes: a home of its own, nothing sent home, our packages in reach."""
    search = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    return os.environ | {
        "FLWR_HOME": str(home),
        "FLWR_TELEMETRY_ENABLED": "0",
        "FLWR_DISABLE_UPDATE_CHECK": "1",
        "FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE": str(PIECE_BYTES),
        "NO_COLOR": "1",
        "PYTHONUNBUFFERED": "1",
        "PYTHONPATH": os.pathsep.join(search),
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        **extra,
    }


def without_proxy_on_loopback(environment: Mapping[str, str]) -> dict[str, str]:
    """The same, with loopback addresses never sent through an HTTP proxy."""
    known = environment.get("NO_PROXY") or environment.get("no_proxy") or ""
    hosts = [*filter(None, known.split(",")), "127.0.0.1", "localhost", "::1"]
    value = ",".join(dict.fromkeys(hosts))
    return {**environment, "NO_PROXY": value, "no_proxy": value}


def free_port() -> int:
    """A port of loopback that nobody uses now."""
    return free_ports(1)[0]


def free_ports(count: int) -> list[int]:
    """Different ports of loopback that nobody uses now."""
    with contextlib.ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
