"""A worker process of the embedded engine: everything imported once, one message after the other.

It is forked from a fork server that has imported torch but run no operation of it, so that CUDA and OpenMP
start in the worker itself. It reads protobuf bytes from a pipe, runs the ClientApp, writes protobuf bytes.
"""

import importlib
import logging
import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from enum import IntEnum
from multiprocessing.connection import Connection
from pathlib import Path

from flwr.app import Context, Error, Message, RecordDict
from flwr.clientapp import ClientApp

from common.files import append_line
from common.serialisation import message_from_bytes, message_to_bytes
from common.settings import Scalar

FIRST_NODE_ID = 1001
"""Node id of the first hospital; Flower keeps 1 for the server."""
READY = b"ready"


class ErrorCode(IntEnum):
    """Flower's numbers for a message that got no answer."""

    LOAD_CLIENT_APP_EXCEPTION = 1
    CLIENT_APP_RAISED_EXCEPTION = 2
    MESSAGE_UNAVAILABLE = 3
    REPLY_MESSAGE_UNAVAILABLE = 4
    NODE_UNAVAILABLE = 5
    CLIENT_APP_CRASHED = 8


@dataclass(frozen=True, kw_only=True)
class WorkerSetup:
    """What a worker has to know before its first message."""

    client_app: str
    """`module:attribute` of the ClientApp."""
    run_config: Mapping[str, Scalar]
    """Flower's run config, the same for all hospitals."""
    num_hospitals: int
    num_threads: int
    """Threads of torch inside this worker."""
    deterministic: bool
    """Refuse kernels that give other bits from run to run."""


def load_client_app(reference: str) -> ClientApp:
    """Import `module:attribute`."""
    module, _, attribute = reference.partition(":")
    app = getattr(importlib.import_module(module), attribute)
    if not isinstance(app, ClientApp):
        raise TypeError(f"{reference} is not a ClientApp")
    return app


def serve(connection: Connection, setup: WorkerSetup) -> None:
    """Answer messages until the pipe closes."""
    prepare_process(num_threads=setup.num_threads, deterministic=setup.deterministic)
    app = load_client_app(setup.client_app)
    connection.send_bytes(READY)
    while request := receive(connection):
        connection.send_bytes(answer(app, request, setup))


def answer(app: ClientApp, request: bytes, setup: WorkerSetup) -> bytes:
    """Run the ClientApp on one message; an exception becomes an error reply without its text."""
    message = message_from_bytes(request)
    partition = message.metadata.dst_node_id - FIRST_NODE_ID
    context = Context(
        run_id=message.metadata.run_id,
        node_id=message.metadata.dst_node_id,
        node_config={"partition-id": partition, "num-partitions": setup.num_hospitals},
        state=RecordDict(),
        run_config=dict(setup.run_config),
    )
    try:
        reply = app(message, context)
    except Exception as error:
        note_error(setup, partition, error)
        reply = Message(Error(code=ErrorCode.CLIENT_APP_RAISED_EXCEPTION), reply_to=message)
    return message_to_bytes(reply)


def note_error(setup: WorkerSetup, partition: int, error: Exception) -> None:
    """Write into the hospitals' folder where a ClientApp failed: code lines, no words of the error."""
    folder = str(setup.run_config.get("runtime.hospitals", ""))
    if not folder:
        return
    frames = traceback.extract_tb(error.__traceback__)[-6:]
    places = " < ".join(f"{Path(frame.filename).name}:{frame.lineno}" for frame in reversed(frames))
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S")
    append_line(
        Path(folder) / "errors.log", f"{stamp} hospital {partition} {type(error).__name__} at {places}"
    )


def prepare_process(*, num_threads: int, deterministic: bool) -> None:
    """Limit threads, leave Ctrl-C and SIGTERM to the parent, end with the parent."""
    import torch

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()
    logging.getLogger("flwr").setLevel(logging.WARNING)
    torch.set_num_threads(num_threads)
    if deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # The same as torch.use_deterministic_algorithms(True), which imports the compiler to tell it.
        torch.set_deterministic_debug_mode("error")


def receive(connection: Connection) -> bytes:
    """The next request; empty when the other side has gone."""
    try:
        return connection.recv_bytes()
    except (EOFError, OSError):
        return b""


def _end_with_parent() -> None:
    """Leave at once when the command dies, even in the middle of a training step."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
