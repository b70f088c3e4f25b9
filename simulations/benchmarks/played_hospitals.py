"""Many hospitals played by one light process: real keys and the real Fleet calls, an invented update.

python -m simulations.benchmarks.played_hospitals FOLDER    FOLDER/*/{hospital.key,enrolment.toml}

Every hospital takes in the model piece by piece and keeps nothing of it. The update is made once, by the one
door out; each hospital sends it with a few low bits of its own, so that no two have a piece in common (Flower
stores equal pieces once).
"""

import argparse
import importlib.metadata
import json
import logging
import signal
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
)
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    ObjectTree,
    PullObjectRequest,
    PushObjectRequest,
)
from flwr.proto.node_pb2 import Node
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_children_ids_from_object_content,
    get_object_tree,
    get_object_type_from_object_content,
    iterate_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor
from flwr.supercore.primitives.asymmetric import public_key_to_bytes
from flwr.supercore.retry import make_simple_http_retry_invoker
from flwr.supercore.run import RunNotRunningException
from flwr.supernode.node_auth_http_interceptor import NodeAuthHttpInterceptor

from client.deployment.fleet_client import GuardedFleetClient
from common import messages
from common.enrolment import ENROLMENT, Enrolment
from common.messages import SCHEMA_VERSION, Envelope
from common.node_keys import load_private_key
from common.serialisation import bare, message_to_proto, set_message_id
from common.settings import load
from simulations.benchmarks.played_update import Update, mark

KEY, SHAPES = "hospital.key", "shapes.json"
_KINDS: Mapping[str, type[InflatableObject]] = {
    kind.__qualname__: kind for kind in (ConfigRecord, MetricRecord, RecordDict, Message)
}
_LOOK_AGAIN_S = 0.3
_STACK_BYTES = 512 * 1024
_SESSION_S = 1800.0
"""The longest that Flower takes: within it a session needs no heartbeat."""

log = logging.getLogger("played")


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """An answer in pieces: the large ones are made again from the common update when they are sent."""

    message: Message
    tree: ObjectTree
    small: Mapping[str, bytes]
    pieces: Mapping[str, tuple[str, int, int]]
    """Entry, first byte and end of each piece of the arrays, by its id."""


class PlayedHospital:
    """One hospital from its session's beginning to the run's end; runs in a thread of its own."""

    def __init__(self, folder: Path, number: int, update: Update) -> None:
        self._enrolment = load(Enrolment, folder / ENROLMENT)
        self._number, self._update = number, update
        key = load_private_key(folder / KEY)
        self._public_key = public_key_to_bytes(key.public_key())
        self._client = GuardedFleetClient.from_server_address(
            self._enrolment.address,
            False,
            self._enrolment.ca_certificate.encode(),
            interceptors=[
                RuntimeVersionHttpInterceptor(component_name="SuperNode"),
                NodeAuthHttpInterceptor(key, key.public_key()),
            ],
            retry_invoker=make_simple_http_retry_invoker(),
        )
        self._node = Node()
        self._run_id = 0

    def run(self, stop: threading.Event) -> None:
        """Answer whatever comes until `stop`."""
        answer = self._client.ActivateNode(
            ActivateNodeRequest(public_key=self._public_key, heartbeat_interval=_SESSION_S)
        )
        self._node = Node(node_id=answer.node_id)
        while not stop.is_set():
            response = self._client.PullMessages(PullMessagesRequest(node=self._node))
            if not response.messages_list:
                continue
            self._run_id = response.messages_list[0].metadata.run_id
            try:
                self._answer(response.message_object_trees[0])
            except RunNotRunningException:
                log.info("%s: the run is over", self._enrolment.hospital)
        self._client.DeactivateNode(DeactivateNodeRequest(node_id=self._node.node_id))

    def _answer(self, tree: ObjectTree) -> None:
        request = self._taken_in(tree)
        with self._update.slots:
            outgoing = self._formed(request)
        self._send(outgoing)

    def _taken_in(self, tree: ObjectTree) -> Message:
        """Take in all pieces as they come, keep the small records, confirm."""
        contents: dict[str, bytes] = {}
        for part in iterate_object_tree(tree):
            content = self._pulled(part.object_id)
            if get_object_type_from_object_content(content) != ArrayChunk.__qualname__:
                contents[part.object_id] = content
        self._client.ConfirmMessageReceived(
            ConfirmMessageReceivedRequest(
                node=self._node, run_id=self._run_id, message_object_id=tree.object_id
            )
        )
        message = _inflated(tree.object_id, contents)
        if not isinstance(message, Message):
            raise TypeError(type(message).__name__)
        set_message_id(message, tree.object_id)
        return message

    def _pulled(self, object_id: str) -> bytes:
        while True:
            response = self._client.PullObject(
                PullObjectRequest(node=self._node, run_id=self._run_id, object_id=object_id)
            )
            if response.object_available:
                return bytes(response.object_content)
            time.sleep(_LOOK_AGAIN_S)

    def _formed(self, request: Message) -> Outgoing:
        reply = Message(RecordDict(dict(self._records(request))), reply_to=request)
        with no_object_id_recompute():
            set_message_id(reply, reply.object_id)
            tree = get_object_tree(reply)
            pieces: dict[str, tuple[str, int, int]] = {}
            for record in reply.content.array_records.values():
                for entry, array in record.items():
                    start = 0
                    for object_id, chunk in array.slice_array():
                        size = len(chunk.data) if isinstance(chunk, ArrayChunk) else 0
                        pieces[object_id] = (entry, start, start + size)
                        start += size
            every = get_all_nested_objects(reply)
            small = {i: thing.deflate() for i, thing in every.items() if i not in pieces}
        return Outgoing(message=bare(reply), tree=tree, small=small, pieces=pieces)

    def _records(self, request: Message) -> dict[str, messages.Record]:
        envelope = Envelope.from_record(request.content)
        records: dict[str, messages.Record] = {messages.ENVELOPE: envelope.to_record()}
        kind = request.metadata.message_type
        if kind == messages.HELLO:
            return records | {messages.HOSPITAL: self._facts()}
        if kind == messages.CLOSING:
            sha256 = request.content.config_records[messages.MODEL]["sha256"]
            return records | {messages.RECEIPT: ConfigRecord({"sha256": sha256, "certificate": ""})}
        common = self._update.records(request, envelope, enrolled=self._enrolment.enrolled_patients)
        return records | {name: self._own(record) for name, record in common.items()}

    def _own(self, record: messages.Record) -> messages.Record:
        if not isinstance(record, ArrayRecord):
            return record
        own = {}
        for entry, array in record.items():
            data = bytearray(array.data)
            mark(data, 0, number=self._number)
            own[entry] = Array(array.dtype, tuple(array.shape), array.stype, bytes(data))
        return ArrayRecord(own)

    def _facts(self) -> ConfigRecord:
        facts: dict[str, Any] = {
            "name": self._enrolment.hospital,
            "enrolled-patients": self._enrolment.enrolled_patients,
            "schema-version": SCHEMA_VERSION,
            "version": importlib.metadata.version("hospital-federation"),
            "flwr": importlib.metadata.version("flwr"),
        }
        return ConfigRecord(facts)

    def _send(self, outgoing: Outgoing) -> None:
        response = self._client.PushMessages(
            PushMessagesRequest(
                node=self._node,
                messages_list=[message_to_proto(outgoing.message)],
                message_object_trees=[outgoing.tree],
                clientapp_runtime_list=[0.0],
            )
        )
        missing = set(response.objects_to_push)
        for part in iterate_object_tree(outgoing.tree):
            if part.object_id in missing:
                missing.discard(part.object_id)
                stored = self._client.PushObject(
                    PushObjectRequest(
                        node=self._node,
                        run_id=self._run_id,
                        session_id=response.session_id,
                        object_id=part.object_id,
                        object_content=self._content(outgoing, part.object_id),
                    )
                ).stored
                if not stored:
                    log.warning("%s: a piece was not stored", self._enrolment.hospital)
                    return

    def _content(self, outgoing: Outgoing, object_id: str) -> bytes:
        if object_id in outgoing.small:
            return outgoing.small[object_id]
        entry, start, end = outgoing.pieces[object_id]
        piece = bytearray(self._update.piece(entry, start, end))
        mark(piece, start, number=self._number)
        return ArrayChunk(memoryview(piece)).deflate()


def _inflated(object_id: str, contents: Mapping[str, bytes]) -> InflatableObject:
    """The object without the values of its arrays."""
    content = contents[object_id]
    kind = get_object_type_from_object_content(content)
    if kind == ArrayRecord.__qualname__:
        return ArrayRecord()
    children = {
        child: _inflated(child, contents) for child in get_object_children_ids_from_object_content(content)
    }
    return _KINDS[kind].inflate(content, children=children or None)


def play(folder: Path, stop: threading.Event) -> None:
    """Play every hospital of `folder` until `stop`; `shapes.json` in it says what the model is."""
    shapes = {name: tuple(shape) for name, shape in json.loads((folder / SHAPES).read_text()).items()}
    update = Update(shapes=shapes)
    threading.stack_size(_STACK_BYTES)
    homes = sorted(path.parent for path in folder.glob(f"*/{KEY}"))
    threads = [
        threading.Thread(target=_play_one, args=(home, number, update, stop), daemon=True)
        for number, home in enumerate(homes)
    ]
    for thread in threads:
        thread.start()
    stop.wait()


def _play_one(home: Path, number: int, update: Update, stop: threading.Event) -> None:
    try:
        PlayedHospital(home, number, update).run(stop)
    except Exception:
        log.exception("%s is played no more", home.name)


def main() -> None:
    """Play until SIGTERM."""
    parser = argparse.ArgumentParser(description="Play hospitals before a real server.")
    parser.add_argument("folder", type=Path)
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO)
    for other in ("httpx", "flwr"):
        logging.getLogger(other).setLevel(logging.ERROR)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    play(parser.parse_args().folder, stop)


if __name__ == "__main__":
    main()
