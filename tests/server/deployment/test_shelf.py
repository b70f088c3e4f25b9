"""Pieces that one hospital has fetched come to the next one from the front's own disk."""

import os

import pytest
from flwr.proto.message_pb2 import PullObjectRequest

from server.deployment.front import FLEET
from server.deployment.parked import SMALL_BYTES, Parked
from server.deployment.shelf import Shelf, piece_asked_for
from tests.server.deployment import front_door
from tests.server.deployment.front_door import ONE_MB

door, people, tls = front_door.door, front_door.people, front_door.tls
PATH = FLEET + "pull-object"
PIECE = os.urandom(2 * ONE_MB)


def call(name, run_id=3):
    return PullObjectRequest(run_id=run_id, object_id=name).SerializeToString()


def asked(door):
    return sum(path == PATH for _, path, _ in door.upstream.asked)


def parked(folder, content):
    made = Parked(folder)
    for start in range(0, len(content), 50_000):
        made.add(content[start : start + 50_000])
    return made


def test_the_superlink_is_asked_once_for_what_all_fetch(door):
    door.upstream.answers[PATH] = (200, PIECE)
    for by in "abab":
        answer = door.post("pull-object", call("x" * 64), by=by)
        assert (answer.status_code, answer.content) == (200, PIECE)
        assert answer.headers["content-type"] == "application/protobuf"
    assert asked(door) == 1
    assert door.post("pull-object", call("x" * 64, run_id=4)).content == PIECE
    assert asked(door) == 2


@pytest.mark.parametrize("answer", [(200, b"small"), (200, b""), (403, b"{}"), (500, b""), (403, PIECE)])
def test_what_is_small_or_no_piece_is_always_asked_for(door, answer):
    door.upstream.answers[PATH] = answer
    for _ in range(2):
        assert door.post("pull-object", call("x" * 64)).status_code in (answer[0], 503)
    assert asked(door) == 2


def test_strangers_get_nothing_from_it(door):
    door.upstream.answers[PATH] = (200, PIECE)
    assert door.post("pull-object", call("x" * 64)).content == PIECE
    assert door.post("pull-object", call("x" * 64), by="stranger").status_code == 401


def test_it_has_an_end_and_what_was_asked_for_least_lately_goes_first(tmp_path):
    shelf = Shelf(most_bytes=250_000)
    for name in (b"a", b"b", b"a", b"c"):
        piece = (1, name.decode())
        if (kept := shelf.take(piece)) is None:
            with parked(tmp_path, 100_000 * name) as made:
                shelf.keep(piece, made)
        else:
            kept.close()
    assert shelf.take((1, "b")) is None
    for name in ("a", "c"):
        with shelf.take((1, name)) as piece:
            assert piece.content() == 100_000 * name.encode()
    with parked(tmp_path, b"x" * 300_000) as large:
        shelf.keep((1, "large"), large)
    assert shelf.take((1, "large")) is None
    assert shelf.take((1, "a")) is not None


def test_a_piece_that_goes_while_it_is_sent_is_sent_to_its_end(tmp_path):
    shelf = Shelf(most_bytes=150_000)
    with parked(tmp_path, b"a" * 100_000) as made:
        shelf.keep((1, "a"), made)
    sending = shelf.take((1, "a"))
    with parked(tmp_path, b"b" * 100_000) as made:
        shelf.keep((1, "b"), made)
    assert shelf.take((1, "a")) is None
    assert sending.content() == b"a" * 100_000


@pytest.mark.parametrize("size", [0, 1, SMALL_BYTES, SMALL_BYTES + 1, 5 * SMALL_BYTES + 17])
def test_parked_bytes_come_back(tmp_path, size):
    content = os.urandom(size)
    with parked(tmp_path, content) as one, one.shared() as other:
        assert (one.size, one.is_small) == (size, size <= SMALL_BYTES)
        assert one.content() == other.content() == content
        assert b"".join(one.stretches()) == content
        assert all(len(stretch) <= 2**16 for stretch in one.stretches())
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_call_for_a_piece_has_no_name():
    assert piece_asked_for(b"\xff\xff") is None
    assert piece_asked_for(b"") is None
    assert piece_asked_for(call("ab")) == (3, "ab")
