"""What this machine offers: clock, ports, disk, memory."""

import ctypes
import errno
import fcntl
import os
import shutil
import socket
import struct
from enum import StrEnum
from pathlib import Path

_STA_UNSYNC, _TIMEX_BYTES, _TIMEX_STATUS = 0x0040, 512, 40
_MIB = 2**20


class PortState(StrEnum):
    """Whether a port can be listened on."""

    FREE = "free"
    TAKEN = "taken"
    NOT_ALLOWED = "not allowed"
    NO_SUCH_ADDRESS = "no such address"


def port_state(host: str, port: int) -> PortState:
    """Try to listen on host:port for a moment, as a server would."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            probe.listen()
        except PermissionError:
            return PortState.NOT_ALLOWED
        except OSError as error:
            return PortState.TAKEN if error.errno == errno.EADDRINUSE else PortState.NO_SUCH_ADDRESS
    return PortState.FREE


def is_clock_synchronised() -> bool | None:
    """Whether the kernel says that a time service steers its clock (adjtimex); None when it does not tell."""
    buffer = ctypes.create_string_buffer(_TIMEX_BYTES)
    try:
        answer = ctypes.CDLL(None, use_errno=True).adjtimex(buffer)
    except (OSError, AttributeError):
        return None
    status = int(struct.unpack_from("i", buffer, _TIMEX_STATUS)[0])
    return None if answer < 0 else not status & _STA_UNSYNC


def free_disk_mb(folder: Path) -> float:
    """MiB that the file system of `folder` has left for this user."""
    return shutil.disk_usage(folder).free / _MIB


def free_memory_mb() -> float | None:
    """MiB of memory that programs can still get without swapping; None where Linux does not say."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("MemAvailable:")), None)


def is_locked(path: Path) -> bool:
    """Whether another process holds the record lock of `path`; only asks, so nobody is disturbed."""
    try:
        descriptor = os.open(path, os.O_RDWR)
    except OSError:
        return False
    try:
        # struct flock of Linux: type, whence, start, length, process.
        question = struct.pack("hhqqi", fcntl.F_WRLCK, os.SEEK_SET, 0, 0, 0)
        answer = fcntl.fcntl(descriptor, fcntl.F_GETLK, question)
        return bool(struct.unpack("hhqqi", answer)[0] != fcntl.F_UNLCK)
    finally:
        os.close(descriptor)
