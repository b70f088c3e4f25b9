"""Tasks of the SuperNode, taken and answered one after the other over its Runtime API on loopback.

Flower's own process for this is started per message, unpacks the bundle and imports from it. Here the bundle
stays what it is: bytes to be hashed.
"""

import ssl
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import httpx
from flwr.app import Message
from flwr.proto.message_pb2 import ObjectTree
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullAppMessagesRequest,
    PullTaskInputRequest,
    PushAppMessagesRequest,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.constant import TaskType
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_protobuf_utils import (
    make_confirm_message_received_fn_protobuf,
    make_pull_object_fn_protobuf,
    make_push_object_fn_protobuf,
)
from flwr.supercore.inflatable.inflatable_utils import (
    ObjectPullError,
    pull_and_inflate_object_from_tree,
    push_objects,
)
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient

from common.serialisation import (
    ProtoMessage,
    bare,
    message_from_proto,
    message_to_proto,
    set_message_id,
)

_ACQUIRE = "/flwr.proto.Runtime/AcquireTask"
_COMPONENT = "flwr-clientapp"
_HEARTBEAT_S = 12.0
"""Flower gives a task up after 30 s (taken) or 60 s (begun) without one."""
_FIRST_LOOK_S, _LONGEST_LOOK_S = 0.02, 0.2
"""A task is there before its message is: how often to look for the rest."""
_MOST_LOOKS = 300
"""For each part, about a minute: a SuperNode that has dropped the message never says so."""


class TaskGone(Exception):  # noqa: N818 - it is an outcome, not a defect
    """The SuperNode has ended, or has given this task up: nobody waits for an answer."""


class TaskUnreadable(Exception):  # noqa: N818
    """The message came and cannot be read; it can be answered with an error."""

    def __init__(self, request: Message) -> None:
        super().__init__("the message cannot be read")
        self.request = request


class Task:
    """A task that this worker has taken; a context manager that keeps it alive meanwhile."""

    def __init__(self, client: RuntimeHttpClient) -> None:
        self._client = client
        self._ended = threading.Event()
        self._heart = threading.Thread(target=self._beat, name="task heartbeat", daemon=True)
        self.bundle = b""
        """The bundle that the run names; never unpacked."""
        self.bundle_name = ""
        """What the server calls it: publisher/name version."""
        self.task_id = self.run_id = self.node_id = 0

    def __enter__(self) -> "Task":
        self._heart.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._client.close()

    def pull_input(self) -> None:
        """Begin the task: who asks, for which run, with which bundle. Raises TaskGone."""
        with _gone():
            response = self._client.PullTaskInput(PullTaskInputRequest())
        self.bundle = response.fab.content
        self.bundle_name = f"{response.run.fab_id} {response.run.fab_version}".strip()
        self.task_id, self.run_id, self.node_id = (
            response.task_id,
            response.run.run_id,
            response.context.node_id,
        )

    def pull_message(self) -> Message:
        """Wait for the message and all its parts.

        Raises TaskGone, TaskUnreadable, and ObjectPullError for a part that does not come.
        """
        with _gone():
            proto, tree = self._message()
            try:
                message = self._inflated(tree)
            except (httpx.HTTPError, ObjectPullError):
                raise
            except Exception:  # whatever Flower's decoders make of bytes from outside
                raise TaskUnreadable(message_from_proto(proto)) from None
        set_message_id(message, tree.object_id)
        return message

    def push(self, reply: Message) -> None:
        """Hand the answer to the SuperNode, then end the task. Raises TaskGone when nobody wants it."""
        set_message_id(reply, reply.object_id)
        with no_object_id_recompute():
            tree = get_object_tree(reply)
            request = PushAppMessagesRequest(
                messages_list=[message_to_proto(bare(reply))], message_object_trees=[tree]
            )
            with _gone():
                stored = self._client.PushMessages(request)
            push_objects(
                get_all_nested_objects(reply),
                make_push_object_fn_protobuf(
                    self._client.PushObject, self._node, run_id=self.run_id, session_id=stored.session_id
                ),
                object_ids_to_push=set(stored.objects_to_push),
            )
        with suppress(httpx.HTTPError):  # the answer is complete; this only tidies the SuperNode's list
            self._client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed"))

    @property
    def _node(self) -> Node:
        return Node(node_id=self.node_id)

    def _message(self) -> tuple[ProtoMessage, ObjectTree]:
        pause = _FIRST_LOOK_S
        for _ in range(_MOST_LOOKS):
            response = self._client.PullMessages(PullAppMessagesRequest())
            if response.messages_list:
                return response.messages_list[0], response.message_object_trees[0]
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_LOOK_S)
        raise ObjectPullError("message", "it did not come")

    def _inflated(self, tree: ObjectTree) -> Message:
        return pull_and_inflate_object_from_tree(
            tree,
            make_pull_object_fn_protobuf(self._client.PullObject, self._node, self.run_id),
            make_confirm_message_received_fn_protobuf(
                self._client.ConfirmMessageReceived, self._node, self.run_id
            ),
            return_type=Message,
            max_tries_per_object=_MOST_LOOKS,
            initial_backoff=_FIRST_LOOK_S,
            backoff_cap=_LONGEST_LOOK_S,
        )

    def _beat(self) -> None:
        while not self._ended.wait(_HEARTBEAT_S):
            with suppress(httpx.HTTPError, RuntimeError, ValueError):  # the next one, or nobody listens
                self._client.SendTaskHeartbeat(SendTaskHeartbeatRequest())


class TaskSource:
    """Where tasks come from: the SuperNode at `address`, which shows the certificate that `tls` trusts.

    Whoever else listens there learns nothing, and what it says is not read.
    """

    def __init__(self, address: str, secret: bytes, tls: ssl.SSLContext) -> None:
        self._url, self._tls = f"https://{address}", tls
        self._client = RuntimeHttpClient(
            self._url,
            verify=tls,
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name=_COMPONENT),
                SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods={_ACQUIRE}),
            ],
        )

    def take(self) -> Task | None:
        """The next task; None while there is none, or no SuperNode of ours. Raises httpx.HTTPStatusError."""
        try:
            response = self._client.AcquireTask(
                AcquireTaskRequest(supported_task_types=[TaskType.CLIENT_APP])
            )
        except httpx.TransportError:
            return None
        if not response.token:
            return None
        return Task(
            RuntimeHttpClient(
                self._url,
                verify=self._tls,
                interceptors=[
                    RuntimeVersionHttpInterceptor(component_name=_COMPONENT),
                    RuntimeTokenHttpInterceptor(response.token),
                ],
            )
        )


@contextmanager
def _gone() -> Iterator[None]:
    """Say TaskGone where the SuperNode has ended or no longer knows the task."""
    try:
        yield
    except httpx.ConnectError as error:
        raise TaskGone("the SuperNode has ended") from error
    except httpx.HTTPStatusError as error:
        if error.response.status_code in (httpx.codes.UNAUTHORIZED, httpx.codes.FORBIDDEN):
            raise TaskGone("the SuperNode has given the task up") from error
        raise
