"""The worker: imports everything once, then answers task after task with the ClientApp of this installation.

    python -m client.deployment.worker_process HOSPITAL_FOLDER

Started and replaced by `client.deployment.supervisor`. Nothing of an arriving bundle is unpacked, installed
or imported: its digest is looked up in the hospital's own list before anything else is done. Which hospital
this is stands in the command line, whatever a message or a node config says.
"""

import logging
import os
import sys
import threading
import time
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx
from flwr.app import ConfigRecord, Context, Error, Message, MetricRecord, RecordDict
from flwr.supercore.task_identity import TaskIdentity

from client.deployment.admission import admitted
from client.deployment.hospital_folder import HospitalFolder
from client.deployment.liveness import BEAT_S
from client.deployment.runtime_certificate import trusting
from client.deployment.tasks import Task, TaskGone, TaskSource, TaskUnreadable
from client.deployment.work import Phase, Work, beat, read_work, write_work
from common import messages

_POLL_S, _SLOW_POLL_S, _AWAKE_S = 0.1, 0.5, 600.0
"""Between two looks for a task: for ten minutes after the last one, and later."""
_NOT_A_TASK_S = 2.0
_RAISED = 2
"""Flower's number for a ClientApp that raised an exception."""

log = logging.getLogger("worker")


class Worker:
    """One hospital's worker process."""

    def __init__(self, folder: HospitalFolder) -> None:
        self._folder = folder
        self._source = TaskSource(
            folder.runtime_address, folder.secret(), trusting(folder.runtime_certificate.read_text())
        )
        self._beaten = 0.0
        self._context = {"hospital-config": str(folder.config_file)}
        self._note(read_work(folder.work_file).at(Phase.STARTING, pid=os.getpid()))

    def prepare(self) -> None:
        """Import the ClientApp with all that it needs, limit threads, and begin to read the images."""
        import torch

        import client.app  # noqa: F401

        if threads := self._folder.config.site.threads:
            torch.set_num_threads(threads)
        self._open_site()
        self._images = threading.Thread(target=self._read_images, name="images", daemon=True)
        self._images.start()
        self._note(self._work.at(Phase.IDLE))

    def serve(self) -> None:
        """Answer tasks until the process is ended."""
        looked_for_since = time.monotonic()
        while True:
            self._beat()
            try:
                task = self._source.take()
            except httpx.HTTPStatusError as error:
                log.warning("no task can be asked for: HTTP %d", error.response.status_code)
                time.sleep(_NOT_A_TASK_S)
                continue
            if task is None:
                awake = time.monotonic() - looked_for_since < _AWAKE_S
                time.sleep(_POLL_S if awake else _SLOW_POLL_S)
                continue
            self._note(self._work.at(Phase.BUSY))
            self._answer(task)
            looked_for_since = time.monotonic()

    def _answer(self, task: Task) -> None:
        """Take, answer and hand back one task; a task that came to nothing is counted."""
        try:
            with task:
                reply = self._reply(task)
                self._note(self._with_last(reply))
                task.push(reply)
        except TaskGone as error:
            log.warning("%s", error)
            self._note(self._work.at(Phase.IDLE))
        except Exception:
            # Somebody may wait for this answer for ever: the supervisor starts the SuperNode anew.
            log.exception("a task was lost")
            self._note(self._work.at(Phase.IDLE, lost=self._work.lost + 1))
        else:
            self._note(self._work.at(Phase.IDLE, done=self._work.done + 1))

    def _reply(self, task: Task) -> Message:
        task.pull_input()
        TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run_id
        TaskIdentity.node_id = task.node_id
        try:
            request = task.pull_message()
        except TaskUnreadable as error:
            log.warning("a message could not be read")
            return _error(error.request)
        context = Context(
            run_id=task.run_id,
            node_id=task.node_id,
            node_config=dict(self._context),
            state=RecordDict(),
            run_config={},
        )
        try:
            return self._answered(task, request, context)
        except Exception:
            log.exception("no answer could be made")
            return _error(request)

    def _answered(self, task: Task, request: Message, context: Context) -> Message:
        refused = admitted(self._folder.state, task.bundle, request, context, name=task.bundle_name)
        if refused is not None:
            return refused
        from client.app import app

        if request.metadata.message_type in (messages.TRAIN, messages.EVALUATE):
            self._images.join()
        return app(request, context)

    def _beat(self) -> None:
        """Show the supervisor that this loop runs."""
        if time.monotonic() - self._beaten >= BEAT_S:
            self._beaten = time.monotonic()
            with suppress(OSError):  # the supervisor sees that the disk takes nothing
                beat(self._folder.work_file)

    def _open_site(self) -> None:
        """Before the images' thread does: two at once would open it twice. A fault is met in every round."""
        from client.site import open_site

        with suppress(Exception):
            open_site(self._no_context())

    def _read_images(self) -> None:
        """Read them as the planned study wants them; a study that asks otherwise reads them again."""
        from client.site import open_site

        try:
            open_site(self._no_context()).images(self._folder.enrolment().plan)
        except Exception as error:  # the first round meets it again, and refuses with its code
            log.warning("the images could not be read ahead: %s", type(error).__name__)

    def _no_context(self) -> Context:
        """For this hospital, in no run."""
        return Context(
            run_id=0, node_id=0, node_config=dict(self._context), state=RecordDict(), run_config={}
        )

    def _with_last(self, reply: Message) -> Work:
        """What the supervisor shows of this answer: kind, round, code, and the cost that was stated."""
        work = self._work
        last: dict[str, Any] = {"last_ended": time.time(), "last_type": reply.metadata.message_type}
        if reply.has_error():
            return replace(work, last_refusal="error", **last)
        envelope = reply.content.get(messages.ENVELOPE)
        if isinstance(envelope, ConfigRecord) and reply.metadata.message_type == messages.TRAIN:
            last |= {"last_round": envelope.get("round"), "last_run": envelope.get("run-id")}
        code = messages.refusal_code(reply.content)
        metrics = reply.content.get(messages.METRICS)
        if isinstance(metrics, MetricRecord):
            last["last_refusal"] = ""
            if reply.metadata.message_type == messages.TRAIN:
                last["epsilon"] = metrics.get(messages.EPSILON)
            elif reply.metadata.message_type == messages.EVALUATE:
                last["last_evaluated"] = last["last_ended"]
                last["evaluation_epsilon"] = metrics.get(messages.EPSILON)
        if code is not None:
            last |= {"last_refusal": code.value}
        return replace(work, **last)

    def _note(self, work: Work) -> None:
        self._work = work
        try:
            write_work(self._folder.work_file, work)
        except OSError as error:  # a full disk must not end the worker
            log.warning("the state of work could not be written: %s", error.strerror)


def _error(request: Message) -> Message:
    """An error without a word about its cause."""
    return Message(Error(code=_RAISED), reply_to=request)


def main() -> None:
    """Answer tasks for the hospital in the folder given as the only argument."""
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(name)s %(message)s", stream=sys.stderr)
    os.umask(0o077)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # too late once CUDA has begun
    worker = Worker(HospitalFolder(Path(sys.argv[1])))
    worker.prepare()
    worker.serve()


if __name__ == "__main__":
    main()
