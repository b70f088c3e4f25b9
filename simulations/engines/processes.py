"""Start worker processes quickly and safely: a fork server that has done the heavy imports, and nothing else.

Forking copies imported modules for free. The fork server runs no torch operation and has no second thread,
so CUDA, OpenMP and SQLite handles are born in the worker that uses them (DESIGN 4.13).
"""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerProcess
from typing import Any

PRELOAD = "simulations.engines.preload"
"""Module that imports what workers need, once, in the fork server."""

_START = threading.Lock()
_CONTEXT = multiprocessing.get_context("forkserver")


def warm_up() -> None:
    """Start the fork server, so that its imports run while the command still reads images. Idempotent."""
    _CONTEXT.set_forkserver_preload([PRELOAD])
    with _one_native_thread():
        forkserver.ensure_running()


def abandon() -> None:
    """End the fork server: a command that fails early must not wait for imports that nobody needs."""
    # There is no public way, and on another Python without this field it merely ends a little later.
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if isinstance(pid, int):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def start_process(
    target: Callable[..., None], arguments: Sequence[Any], *, name: str
) -> tuple[ForkServerProcess, Connection]:
    """Fork a process running `target(connection, *arguments)`; give it and our end of its pipe.

    It ends when this process does. Raises OSError or EOFError when the fork server cannot start.
    """
    warm_up()
    ours, theirs = _CONTEXT.Pipe(duplex=True)
    process = _CONTEXT.Process(target=target, args=(theirs, *arguments), name=name, daemon=True)
    try:
        with _START:
            process.start()
    except BaseException:
        ours.close()
        raise
    finally:
        # Only the child holds its end from now on: its death is an end of file here.
        theirs.close()
    return process, ours


def stop_process(process: ForkServerProcess, connection: Connection, *, patience_s: float = 2.0) -> None:
    """Close the pipe, which asks the process to end, and kill it when it has not ended in `patience_s`."""
    connection.close()
    process.join(patience_s)
    if process.is_alive():
        process.kill()
        process.join()


@contextmanager
def _one_native_thread() -> Iterator[None]:
    """Keep BLAS libraries from starting threads in the fork server: a fork would lose them."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})
