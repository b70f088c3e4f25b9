"""Messages on their way to the SuperLink, one object after the other.

Flower's own way makes the content of every object before it sends the first: a second model in memory.
"""

import gc
from collections.abc import Sequence

from flwr.app import Message
from flwr.proto.message_pb2 import PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.runtime_pb2 import PushAppMessagesRequest
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_all_nested_objects,
    get_object_tree,
)
from flwr.supercore.inflatable.inflatable_utils import ObjectPushError
from flwr.supercore.runtime import RuntimeHttpClient

from common.serialisation import bare, message_to_proto


def push(client: RuntimeHttpClient, node: Node, run_id: int, messages: Sequence[Message]) -> list[str]:
    """Hand messages with ids to the SuperLink; ids of those it took, "" for others.

    What several messages hold in common is sent once. Raises ObjectPushError when the SuperLink has given
    the messages up meanwhile, httpx.HTTPError.
    """
    objects: dict[str, InflatableObject] = {}
    for message in messages:
        objects |= get_all_nested_objects(message)
    answer = client.PushMessages(
        PushAppMessagesRequest(
            messages_list=[message_to_proto(bare(message)) for message in messages],
            message_object_trees=[get_object_tree(message) for message in messages],
        )
    )
    for object_id in answer.objects_to_push:
        stored = client.PushObject(
            PushObjectRequest(
                node=node,
                run_id=run_id,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
                session_id=answer.session_id,
            )
        ).stored
        gc.collect(1)  # a sent request refers to itself, and holds its piece
        if not stored:
            raise ObjectPushError(object_id, run_id, answer.session_id)
    return list(answer.message_ids)
