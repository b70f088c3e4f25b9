"""A message made of its objects, each fetched when its turn comes: a large array is in memory once.

Flower's own way has all pieces, their values and the array from them at the same time: three models.
"""

import json
from collections.abc import Callable, Mapping

from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict
from flwr.app.message.arraychunk import ArrayChunk
from flwr.proto.message_pb2 import ObjectTree
from flwr.supercore.inflatable.inflatable_object import (
    InflatableObject,
    get_object_body,
    get_object_head_values_from_object_content,
)

MOST_BYTES = 512 * 2**20
"""Of one message: what the front lets a hospital send, see `FrontSettings.max_reply_bytes`."""
_KINDS: dict[str, type[InflatableObject]] = {
    kind.__qualname__: kind for kind in (ConfigRecord, MetricRecord, RecordDict, Message)
}


def inflated(tree: ObjectTree, pull: Callable[[str], bytes], *, most_bytes: int = MOST_BYTES) -> object:
    """The object at the root of `tree`; `pull` gives the content of an object by its id.

    Raises what `pull` raises, and ValueError, KeyError, TypeError or whatever Flower's decoders make of
    bytes from outside: also where an array would grow beyond `most_bytes` by naming a piece many times.
    """
    left = most_bytes

    def counted(object_id: str) -> bytes:
        nonlocal left
        content = pull(object_id)
        left -= len(content)
        if left < 0:
            raise ValueError("the message is too large")
        return content

    return _inflated(tree, counted)


def _inflated(tree: ObjectTree, pull: Callable[[str], bytes]) -> InflatableObject:
    content = pull(tree.object_id)
    kind, child_ids, _ = get_object_head_values_from_object_content(content)
    if kind == Array.__qualname__:
        return _array(content, child_ids, pull)
    below = {child.object_id: child for child in tree.children}
    children = {child_id: _inflated(below[child_id], pull) for child_id in child_ids}
    if kind == ArrayRecord.__qualname__:
        return _array_record(content, children)
    return _KINDS[kind].inflate(content, children=children)


def _array_record(content: bytes, arrays: Mapping[str, InflatableObject]) -> ArrayRecord:
    """Not by Flower's own way, which takes `bytes` only."""
    record = ArrayRecord()
    for name, array_id in json.loads(get_object_body(content, ArrayRecord).decode()).items():
        array = arrays[array_id]
        if not isinstance(array, Array):
            raise TypeError(type(array).__name__)
        record[name] = array
    return record


def _array(content: bytes, piece_ids: list[str], pull: Callable[[str], bytes]) -> Array:
    described = json.loads(get_object_body(content, Array).decode())
    data = bytearray()
    for index in described["arraychunk_ids"]:
        data += get_object_body(pull(piece_ids[index]), ArrayChunk)
    array = Array(described["dtype"], tuple(described["shape"]), described["stype"], b"")
    array.data = data  # type: ignore[assignment]  # bytes of it would be a second model
    return array
