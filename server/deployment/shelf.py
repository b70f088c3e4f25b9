"""Pieces of models that hospitals have fetched lately, on the disk: the next hospital gets them from here.

All hospitals of a round fetch the same pieces, and a piece is named by the hash of its content. Flower gives
one to whoever is enrolled and knows its name; so does the shelf. What is on it is gone with the front.
"""

from collections import OrderedDict

from flwr.proto.message_pb2 import PullObjectRequest
from google.protobuf.message import DecodeError

from server.deployment.parked import Parked

MOST_BYTES = 2**30
"""Of all that is kept; what was asked for least lately goes first."""
Name = tuple[int, str]


class Shelf:
    """Answers to calls for pieces, by run and name of the piece."""

    def __init__(self, most_bytes: int = MOST_BYTES) -> None:
        self._most, self._held = most_bytes, 0
        self._pieces: OrderedDict[Name, Parked] = OrderedDict()

    def take(self, name: Name | None) -> Parked | None:
        """The answer, if it is here."""
        if name is None or (piece := self._pieces.get(name)) is None:
            return None
        self._pieces.move_to_end(name)
        return piece.shared()

    def keep(self, name: Name | None, answer: Parked) -> None:
        """Have it for the next one who asks."""
        if name is None or name in self._pieces or answer.size > self._most:
            return
        self._pieces[name] = answer.shared()
        self._held += answer.size
        while self._held > self._most:
            _, oldest = self._pieces.popitem(last=False)
            self._held -= oldest.size
            oldest.close()


def piece_asked_for(body: bytes) -> Name | None:
    """Run and name of the piece that a call asks for; None where it is no such call."""
    try:
        request = PullObjectRequest.FromString(body)
    except DecodeError:
        return None
    return (request.run_id, request.object_id) if request.object_id else None
