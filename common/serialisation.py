"""Flower messages as the protobuf that Flower itself puts on a wire.

The only place that reaches below Flower's public packages for this: `flwr.app` has no function that turns a
whole message into bytes.
"""

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

__all__ = [
    "ProtoMessage",
    "bare",
    "message_from_bytes",
    "message_from_proto",
    "message_to_bytes",
    "message_to_proto",
    "set_message_id",
]


def message_to_bytes(message: Message) -> bytes:
    """Encode metadata, content and error of `message`."""
    content: bytes = message_to_proto(message).SerializeToString()
    return content


def message_from_bytes(content: bytes) -> Message:
    """Decode what `message_to_bytes` wrote; raises ValueError for other bytes."""
    try:
        return message_from_proto(ProtoMessage.FromString(content))
    except Exception as error:  # protobuf's DecodeError and Flower's checks have no common base
        raise ValueError(f"not a Flower message: {type(error).__name__}") from None


def bare(message: Message) -> Message:
    """The message without its content, which travels as objects of its own; an error stays."""
    return remove_content_from_message(message)


def set_message_id(message: Message, message_id: str) -> None:
    """Give `message` its id, as Flower's own grids and ClientApp processes do (there is no public setter)."""
    message.metadata.__dict__["_message_id"] = message_id
