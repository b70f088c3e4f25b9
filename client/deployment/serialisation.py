"""Flower messages to and from the protobuf that its SuperNode speaks (there is no public function)."""

from flwr.app import Message
from flwr.app.message import remove_content_from_message
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.message_pb2 import Message as ProtoMessage

__all__ = ["ProtoMessage", "bare", "message_from_proto", "message_to_proto", "set_message_id"]


def bare(message: Message) -> Message:
    """The message without its content, which travels as objects of its own; an error stays."""
    return remove_content_from_message(message)


def set_message_id(message: Message, message_id: str) -> None:
    """Give `message` its id, as Flower's own ClientApp process does (there is no public setter)."""
    message.metadata.__dict__["_message_id"] = message_id
