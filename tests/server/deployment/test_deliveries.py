"""What the front knows of messages and replies, and what the server process hears of it."""

import time

import pytest
from flwr.proto.fleet_pb2 import PushMessagesRequest, PushMessagesResponse
from flwr.proto.message_pb2 import (
    ConfirmMessageReceivedRequest,
    Message,
    Metadata,
    PushObjectRequest,
    PushObjectResponse,
)

from server.deployment.deliveries import Deliveries
from server.deployment.front import FLEET, PULL
from server.deployment.news import Kind
from tests.server.deployment import front_door
from tests.server.deployment.front_door import ONE_MB, Door, Upstream, message

door, people, tls = front_door.door, front_door.people, front_door.tls

ONE, TWO = "1" * 64, "2" * 64
STORED = (200, PushObjectResponse(stored=True).SerializeToString())
NOT_STORED = (200, PushObjectResponse(stored=False).SerializeToString())


def begins(door, *missing, session="s"):
    answer = PushMessagesResponse(session_id=session, objects_to_push=missing)
    door.upstream.answers[FLEET + "push-messages"] = (200, answer.SerializeToString())


def take(door, name, *, by="a"):
    door.upstream.answers[PULL] = [(200, message(name))]
    assert door.pull(by=by).content
    confirm(door, name, by=by)


def confirm(door, name, *, by="a"):
    confirmation = ConfirmMessageReceivedRequest(message_object_id=name).SerializeToString()
    assert door.post("confirm-message-received", confirmation, by=by).status_code == 200


def reply(door, name, *, by="a", node=0):
    answer = Message(metadata=Metadata(reply_to_message_id=name, src_node_id=node))
    return door.post("push-messages", PushMessagesRequest(messages_list=[answer]).SerializeToString(), by=by)


def push(door, name, said=STORED, *, size=0, session="s"):
    door.upstream.answers[FLEET + "push-object"] = said
    part = PushObjectRequest(session_id=session, object_id=name, object_content=b"x" * size)
    return door.post("push-object", part.SerializeToString()).status_code


def test_the_server_hears_when_a_reply_is_whole_and_which_are_lost(door):
    begins(door, "x", "y")
    take(door, ONE)
    take(door, TWO)
    reply(door, ONE)
    assert door.news.fresh() == [(Kind.BEGUN, ONE)]
    push(door, "x")
    assert door.news.fresh() == []
    push(door, "y")
    assert door.news.fresh() == [(Kind.WHOLE, ONE)]
    door.upstream.answers[FLEET + "activate-node"] = (412, b"{}")
    door.post("activate-node")
    assert door.news.fresh() == []
    door.upstream.answers[FLEET + "activate-node"] = (200, b"")
    door.post("activate-node")
    assert door.news.fresh() == [(Kind.LOST, TWO)]
    door.post("activate-node")
    assert door.news.fresh() == []


def test_a_part_that_flower_did_not_store_does_not_count(door):
    begins(door, "x", "y")
    take(door, ONE)
    reply(door, ONE)
    door.news.fresh()
    assert push(door, "x") == 200
    assert push(door, "y", (502, b"")) == 503  # comes again
    assert door.news.fresh() == []
    assert push(door, "unasked", NOT_STORED) == 200
    assert door.news.fresh() == []
    assert push(door, "y", NOT_STORED) == 200  # a SuperNode gives up here
    assert door.news.fresh() == [(Kind.LOST, ONE)]
    assert push(door, "y") == 413
    assert door.news.fresh() == []


def test_a_hospital_killed_in_mid_upload_is_told_as_lost_when_it_is_back(door):
    begins(door, "x", "y")
    take(door, ONE)
    reply(door, ONE)
    push(door, "x")
    door.news.fresh()
    door.post("activate-node")
    assert door.news.fresh() == [(Kind.LOST, ONE)]


def test_ids_that_were_not_handed_to_this_key_are_no_news(door, tmp_path):
    take(door, ONE)
    confirm(door, TWO)
    confirm(door, ONE, by="b")
    for name in (TWO, "f" * (2**18), "g" * 64, ONE + "\nwhole " + TWO):
        assert reply(door, name).status_code == 200
    reply(door, ONE, by="b")
    door.post("activate-node", by="b")
    begins(door, "x")
    for name in ("f" * (2**18), "g" * 64, ONE + "\nwhole " + TWO):
        assert reply(door, name).status_code == 200
    assert not (tmp_path / "replies").exists()
    assert reply(door, ONE, node=7).status_code == 403  # in the name of another
    door.post("activate-node")
    assert door.news.fresh() == [(Kind.LOST, ONE)]


def test_a_reply_to_a_message_of_before_this_process_is_heard_of_when_flower_takes_it(door):
    begins(door, "x")
    reply(door, ONE)
    push(door, "x")
    assert door.news.fresh() == [(Kind.BEGUN, ONE), (Kind.WHOLE, ONE)]


def test_a_reply_has_a_largest_size(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), max_reply_bytes=ONE_MB) as door:
        begins(door, "x", "y", "z")
        take(door, ONE)
        reply(door, ONE)
        assert push(door, "x", (502, b""), size=900_000) == 503
        assert push(door, "x", size=900_000) == 200
        assert push(door, "y", size=100_000) == 200
        door.news.fresh()
        assert push(door, "z", size=100_000) == 413
        assert push(door, "z", size=1) == 413
        assert door.news.fresh() == [(Kind.LOST, ONE)]
        parts = [push(door, "z", size=900_000, session=f"made up {i}") for i in range(3)]
        assert parts == [200, 413, 413]  # sessions that nobody has begun count together
        begins(door, "z", session="t")
        take(door, TWO)
        reply(door, TWO)
        assert push(door, "z", size=900_000, session="t") == 200
        assert door.news.fresh() == [(Kind.BEGUN, TWO), (Kind.WHOLE, TWO)]


def test_what_is_no_message_is_400(door):
    for call in ("push-object", "push-messages", "confirm-message-received"):
        assert door.post(call, b"\xff\xff\xff").status_code == 400
    assert door.upstream.asked == []


def test_a_message_handed_out_three_times_in_vain_is_told_as_lost(tls, people, tmp_path):
    with Door(tls, people, tmp_path, Upstream(), hold_s=0.0) as door:
        door.upstream.answers[PULL] = [(200, message(ONE))]
        assert [bool(door.pull().content) for _ in range(3)] == [True, True, True]
        assert door.news.fresh() == []
        assert [bool(door.pull().content) for _ in range(2)] == [False, False]
        assert door.news.fresh() == [(Kind.LOST, ONE)]


@pytest.fixture
def told():
    return []


@pytest.fixture
def books(told):
    """Deliveries at a clock that a test moves."""
    deliveries = Deliveries(
        lambda *line: told.append(line), most_reply_bytes=1000, clock=lambda: deliveries.now
    )
    deliveries.now = time.time()
    return deliveries


def test_a_slow_reply_is_told_as_begun_again_while_parts_arrive(books, told):
    books.next_for("k", message(ONE, ttl=3600))
    books.confirmed("k", ONE)
    books.replied("k", ONE, session="s", missing=[str(n) for n in range(9)])
    for n in range(9):
        books.now += 20
        books.part_begins("k", "s", 10)
        books.part_ended("k", "s", str(n), size=10, stored=True)
        books.part_ended("k", "s", "0", size=0, stored=True)  # the same part again is no progress
    assert told == [(Kind.BEGUN, ONE)] * 5 + [(Kind.WHOLE, ONE)]


def test_the_books_do_not_grow_without_end(books, told):
    for n in range(100):
        name = f"{n:064x}"
        books.next_for("k", message(name, ttl=3600))
        books.confirmed("k", name)
        books.replied("k", name, session=f"s{n}", missing=["x"])
    assert len(books._callers["k"].sessions) == 16
    books.now += 4000
    books.next_for("k", b"")
    books.activated("k")
    assert told == [(Kind.BEGUN, f"{n:064x}") for n in range(100)]


def test_a_repeated_beginning_of_a_reply_gets_the_same_session(door):
    """After a cut the first request arrives beside its repetition; a second session would close the first."""
    take(door, ONE)
    begins(door, "x", session="first")
    first = PushMessagesResponse.FromString(reply(door, ONE).content)
    begins(door, "x", session="second")
    again = PushMessagesResponse.FromString(reply(door, ONE).content)
    assert (first.session_id, again.session_id) == ("first", "first")
    assert push(door, "x", session="first") == 200
    assert door.news.fresh() == [(Kind.BEGUN, ONE), (Kind.WHOLE, ONE)]


def test_a_beginning_that_failed_is_tried_again(door):
    take(door, ONE)
    door.upstream.answers[FLEET + "push-messages"] = (500, b"")
    assert reply(door, ONE).status_code == 503
    begins(door, "x")
    assert reply(door, ONE).status_code == 200
