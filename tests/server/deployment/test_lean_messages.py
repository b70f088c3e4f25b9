"""Messages on their way through the Grid: piece by piece, and the same as by Flower's own way."""

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.common.constant import FLWR_PRIVATE_MAX_ARRAY_CHUNK_SIZE as PIECE
from flwr.proto.message_pb2 import PushObjectResponse
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_id,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError, inflate_object_from_contents

from common.serialisation import message_to_bytes, set_message_id
from server.deployment.inflation import inflated
from server.deployment.outgoing import push

pytestmark = pytest.mark.usefixtures("flower_identity")


def arrays(size=2 * PIECE + 17, seed=0):
    data = np.random.default_rng(seed).bytes(size)
    return ArrayRecord({"parameters": Array("uint8", (size,), "safetensors", data)})


def message(record, node=7, **more):
    records = {
        "arrays": record,
        "c": ConfigRecord({"x": 1}),
        "m": MetricRecord({"y": 2.0}),
        "e": ConfigRecord(),
    }
    made = Message(RecordDict(records | more), node, "train", ttl=60.0, group_id="1")
    set_message_id(made, made.object_id)
    return made


def contents(one):
    return {object_id: part.deflate() for object_id, part in get_all_nested_objects(one).items()}


@pytest.mark.parametrize("size", [0, 1, PIECE, 2 * PIECE + 17])
def test_a_message_is_what_flower_makes_of_its_objects(size):
    sent = message(arrays(size))
    objects = contents(sent)
    ours = inflated(get_object_tree(sent), objects.__getitem__)
    flowers = inflate_object_from_contents(sent.metadata.message_id, dict(objects))
    assert isinstance(ours, Message)
    assert bytes(ours.content["arrays"]["parameters"].data) == sent.content["arrays"]["parameters"].data
    ours.content["arrays"]["parameters"].data = bytes(ours.content["arrays"]["parameters"].data)
    assert message_to_bytes(ours) == message_to_bytes(flowers)


def test_equal_pieces_are_one_object_and_all_there():
    sent = message(ArrayRecord({"parameters": Array("uint8", (3 * PIECE,), "safetensors", bytes(3 * PIECE))}))
    ours = inflated(get_object_tree(sent), contents(sent).__getitem__)
    assert bytes(ours.content["arrays"]["parameters"].data) == bytes(3 * PIECE)


def test_a_small_message_cannot_become_a_large_one():
    """One piece that is named a thousand times: Flower's own decoder would make 5 GB of it."""
    sent = message(ArrayRecord({"parameters": Array("uint8", (2 * PIECE,), "safetensors", bytes(2 * PIECE))}))
    objects = contents(sent)
    (array_id,) = [i for i, content in objects.items() if content.startswith(b"Array ")]
    head, _, body = objects[array_id].partition(b"\0")
    body = body.replace(b"[0, 0]", str([0] * 1000).encode())
    objects[array_id] = head.rsplit(b" ", 1)[0] + f" {len(body)}".encode() + b"\0" + body
    pulled = []
    with pytest.raises(ValueError, match="too large"):
        inflated(get_object_tree(sent), lambda i: pulled.append(i) or objects[i], most_bytes=4 * PIECE)
    assert len(pulled) < 10


def test_an_array_record_of_something_else_is_refused():
    sent = message(arrays(10))
    objects = contents(sent)
    (array_id,) = [i for i, content in objects.items() if content.startswith(b"Array ")]
    objects[array_id] = b"ConfigRecord  0\0"
    with pytest.raises(TypeError):
        inflated(get_object_tree(sent), objects.__getitem__)


class SuperLink:
    def __init__(self, *, stores=True):
        self.objects, self.missing, self.stores = {}, [], stores

    def PushMessages(self, request):
        self.request = request
        seen = dict.fromkeys(i for tree in request.message_object_trees for i in ids_of(tree))
        self.missing = list(seen)
        ids = [m.metadata.message_id for m in request.messages_list]
        return PushAppMessagesResponse(message_ids=ids, objects_to_push=self.missing, session_id="s")

    def PushObject(self, request):
        assert (request.session_id, request.run_id) == ("s", 3)
        assert get_object_id(request.object_content) == request.object_id
        assert request.object_id not in self.objects
        self.objects[request.object_id] = request.object_content
        return PushObjectResponse(stored=self.stores)


def ids_of(tree):
    return [*(i for child in tree.children for i in ids_of(child)), tree.object_id]


def test_what_messages_have_in_common_is_sent_once_and_all_arrives():
    record, superlink = arrays(), SuperLink()
    sent = [message(record, node, own=ConfigRecord({"node": node})) for node in (7, 8, 9)]
    with no_object_id_recompute():
        assert push(superlink, Node(node_id=1), 3, sent) == [m.metadata.message_id for m in sent]
    assert superlink.request.ByteSize() < 10_000
    for one in sent:
        there = inflated(get_object_tree(one), superlink.objects.__getitem__)
        assert bytes(there.content["arrays"]["parameters"].data) == record["parameters"].data
    assert len(superlink.objects) == len(superlink.missing)


def test_messages_that_the_superlink_has_given_up_are_an_error():
    with pytest.raises(ObjectPushError):
        push(SuperLink(stores=False), Node(node_id=1), 3, [message(arrays(10))])
