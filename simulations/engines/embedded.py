"""The embedded engine: Flower's `Grid` inside this process, ClientApps in worker processes.

The same two apps as in a real federation run unchanged. Every message crosses a pipe as Flower's protobuf
bytes, so byte counts are real and nothing is shared by accident. Nothing of a ClientApp's exception
travels: a failed message is answered with a number.
"""

import heapq
import os
import threading
import time
import uuid
from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import Self

from flwr.app import Context, Error, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.supercore.run import Run
from flwr.supercore.task_identity import TaskIdentity

from common.errors import FederationError
from common.serialisation import message_from_bytes, message_to_bytes, set_message_id
from common.settings import Scalar
from simulations.engines.pool import Job, WorkerPool
from simulations.engines.worker import FIRST_NODE_ID, ErrorCode, WorkerSetup

SERVER_NODE_ID = 1
CLIENT_APP = "client.app:app"


class EngineError(FederationError):
    """The engine itself cannot go on (no worker process can be started)."""


class EmbeddedGrid(Grid):
    """Sends messages to worker processes on this machine; as a context manager it ends them."""

    def __init__(self, setup: WorkerSetup, *, num_workers: int) -> None:
        self._node_ids = [FIRST_NODE_ID + number for number in range(setup.num_hospitals)]
        self._known = frozenset(self._node_ids)
        self._arrived = threading.Condition()
        self._waiting: dict[str, Message] = {}
        self._ends: list[tuple[float, str]] = []
        """Heap of when each message ends, for those that wait and some that were answered."""
        self._replies: dict[str, Message] = {}
        self._run = Run.create_empty(run_id=1)
        # `Message(...)` reads its sender from here, as under Flower's own engines.
        TaskIdentity.run_id = TaskIdentity.task_id = self._run.run_id
        TaskIdentity.node_id = SERVER_NODE_ID
        self.pool = WorkerPool(setup, num_workers=num_workers, on_reply=self._on_reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """End all worker processes."""
        self.pool.close()

    def set_run(self, run: Run) -> None:
        """Take over Flower's run information."""
        self._run = run

    @property
    def run(self) -> Run:
        """Run information; `bytes_sent` and `bytes_recv` count what crossed the pipes."""
        return Run(**vars(self._run))

    def create_message(
        self,
        content: RecordDict,
        message_type: str,
        dst_node_id: int,
        group_id: str,
        ttl: float | None = None,
    ) -> Message:
        """Create a message; `Message(...)` does the same."""
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        """Node ids of all hospitals, in roster order."""
        return list(self._node_ids)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        """Queue messages; gives their new ids in the same order."""
        message_ids = []
        for message in messages:
            message_id = str(uuid.uuid4())
            set_message_id(message, message_id)
            message_ids.append(message_id)
            self._push(message_id, message)
        return message_ids

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        """Replies that are there now, each handed over once; never waits. Raises EngineError."""
        if self.pool.is_broken:
            raise EngineError(
                "no worker process can be started",
                why="each one ended before its first message (out of memory, or an import fails)",
                fix="run `python -c 'import client.app'`; free memory; or use fewer --hospitals",
            )
        with self._arrived:
            self._expire()
            if not self._replies:
                return []
            wanted = set(message_ids)
            found = [name for name in self._replies if name in wanted]
            return [self._replies.pop(message_id) for message_id in found]

    def send_and_receive(
        self, messages: Iterable[Message], *, timeout: float | None = None
    ) -> Iterable[Message]:
        """Send, then wait until every reply is there or `timeout` seconds have passed."""
        open_ids = set(self.push_messages(messages))
        give_up_at = None if timeout is None else time.monotonic() + timeout
        replies: list[Message] = []
        while open_ids:
            arrived = list(self.pull_messages(open_ids))
            replies += arrived
            open_ids -= {reply.metadata.reply_to_message_id for reply in arrived}
            if give_up_at is not None and time.monotonic() >= give_up_at:
                break
            if open_ids:
                with self._arrived:
                    if open_ids.isdisjoint(self._replies):
                        self._arrived.wait(timeout=0.2)
        return replies

    def _push(self, message_id: str, message: Message) -> None:
        metadata = message.metadata
        # To answer for a hospital only the metadata is needed; the content would keep a model per hospital.
        stub = Message(
            RecordDict(),
            metadata.dst_node_id,
            metadata.message_type,
            ttl=metadata.ttl,
            group_id=metadata.group_id,
        )
        set_message_id(stub, message_id)
        if metadata.dst_node_id not in self._known:
            self._answer_with_error(message_id, stub, ErrorCode.NODE_UNAVAILABLE)
            return
        expires_at = metadata.created_at + metadata.ttl
        with self._arrived:
            self._waiting[message_id] = stub
            heapq.heappush(self._ends, (expires_at, message_id))
        self.pool.submit(
            Job(
                message_id=message_id,
                node_id=metadata.dst_node_id,
                request=lambda: self._sent(message),
                expires_at=expires_at,
            )
        )

    def _sent(self, message: Message) -> bytes:
        """The bytes of a message whose turn has come; called from a worker's thread."""
        request = message_to_bytes(message)
        with self._arrived:
            self._run.bytes_sent += len(request)
        return request

    def _on_reply(self, job: Job, content: bytes | None) -> None:
        """Called from a worker's thread: `content` is None when the worker died with the message."""
        with self._arrived:
            stub = self._waiting.pop(job.message_id, None)
        if stub is None:  # it has expired and was answered already
            return
        if content is None:
            self._answer_with_error(job.message_id, stub, ErrorCode.CLIENT_APP_CRASHED)
            return
        reply = message_from_bytes(content)
        set_message_id(reply, str(uuid.uuid4()))
        with self._arrived:
            self._run.bytes_recv += len(content)
            self._replies[job.message_id] = reply
            self._arrived.notify_all()

    def _answer_with_error(self, message_id: str, stub: Message, code: ErrorCode) -> None:
        reply = Message(Error(code=int(code)), reply_to=stub)
        set_message_id(reply, str(uuid.uuid4()))
        with self._arrived:
            self._replies[message_id] = reply
            self._arrived.notify_all()

    def _expire(self) -> None:
        """Answer for messages whose time to live is over (holding the lock)."""
        now = time.time()
        while self._ends and self._ends[0][0] < now:
            _, message_id = heapq.heappop(self._ends)
            if (stub := self._waiting.pop(message_id, None)) is not None:
                self._answer_with_error(message_id, stub, ErrorCode.REPLY_MESSAGE_UNAVAILABLE)


def available_cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0))


def open_grid(
    run_config: Mapping[str, Scalar],
    *,
    num_hospitals: int,
    reproducible: bool,
    client_app: str = CLIENT_APP,
    num_workers: int | None = None,
) -> EmbeddedGrid:
    """Start workers for `num_hospitals` so that cores are neither idle nor oversubscribed.

    As many workers as cores or hospitals, whichever is fewer; a worker's torch gets the cores that are left
    over. In reproducible mode it gets one thread and deterministic kernels, so that sums do not change.
    """
    cores = available_cores()
    workers = num_workers or max(1, min(cores, num_hospitals))
    setup = WorkerSetup(
        client_app=client_app,
        run_config=dict(run_config),
        num_hospitals=num_hospitals,
        num_threads=1 if reproducible else max(1, cores // workers),
        deterministic=reproducible,
    )
    return EmbeddedGrid(setup, num_workers=workers)


def run_server_app(app: ServerApp, grid: Grid, run_config: Mapping[str, Scalar]) -> None:
    """Call the ServerApp with the grid until it ends."""
    context = Context(
        run_id=grid.run.run_id,
        node_id=SERVER_NODE_ID,
        node_config={},
        state=RecordDict(),
        run_config=dict(run_config),
    )
    app(grid, context)
