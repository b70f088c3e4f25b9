import gc
import time
import weakref

import pytest
from flwr.app import ConfigRecord, Message, RecordDict

from server.exchange import receive, send
from tests.server.fake_federation import FakeGrid


def content():
    return RecordDict({"x": ConfigRecord({"value": 1})})


def echo(request):
    return Message(request.content, reply_to=request)


def send_to(grid, *nodes):
    return send(grid, {node: content() for node in nodes}, message_type="train", group="1", ttl_s=5)


def test_every_node_gets_one_message_and_its_size_is_known():
    grid = FakeGrid({1: echo, 2: echo})
    before = time.time()
    sent = send_to(grid, 2, 1)
    assert set(sent) == {1, 2}
    assert all(request.num_bytes > 0 and before <= request.sent <= time.time() for request in sent.values())
    assert [m.metadata.ttl for m in grid.sent] == [5, 5]


@pytest.mark.parametrize("marker", [None, "absent"])
def test_what_the_grid_did_not_take_is_not_sent(marker):
    class Grudging(FakeGrid):
        def push_messages(self, outgoing):
            ids = super().push_messages(outgoing)
            return [None, *ids[1:]] if marker is None else ids[1:]

    assert set(send_to(Grudging({1: echo, 2: echo}), 1, 2)) == {2}


def test_replies_come_once_each_and_strangers_are_dropped():
    grid = FakeGrid({1: lambda request: [echo(request), echo(request)], 2: echo})
    sent = send_to(grid, 1, 2)
    stranger = echo(grid.sent[0])
    stranger.metadata.__dict__["_reply_to_message_id"] = "elsewhere"
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: [stranger, *pull(ids)]
    replies = list(receive(grid, [s.message_id for s in sent.values()], timeout_s=5))
    assert sorted(reply.metadata.src_node_id for reply in replies) == [1, 2]


def test_time_is_over_for_the_silent():
    grid = FakeGrid({1: echo, 2: lambda request: None})
    sent = send_to(grid, 1, 2)
    began = time.monotonic()
    replies = list(receive(grid, [s.message_id for s in sent.values()], timeout_s=0.3))
    assert len(replies) == 1
    assert 0.3 <= time.monotonic() - began < 0.5


def test_large_replies_are_fetched_one_at_a_time():
    grid = FakeGrid(dict.fromkeys(range(1, 6), echo))
    sent = send_to(grid, *range(1, 6))
    asked = []
    pull = grid.pull_messages
    grid.pull_messages = lambda ids: asked.append(len(ids)) or pull(ids)
    ids = [s.message_id for s in sent.values()]
    assert len(list(receive(grid, ids, timeout_s=5, reply_bytes=2**30))) == 5
    assert asked == [1] * 5


def test_a_reply_that_was_let_go_is_gone_before_the_next_is_fetched():
    grid = FakeGrid(dict.fromkeys(range(1, 4), echo))
    sent = send_to(grid, *range(1, 4))
    seen, pull = [], grid.pull_messages

    def pull_and_look(ids):
        gc.collect()
        assert not any(one() for one in seen)
        replies = list(pull(ids))
        seen.extend(weakref.ref(one) for one in replies)
        return replies

    grid.pull_messages = pull_and_look
    for reply in receive(grid, [s.message_id for s in sent.values()], timeout_s=5, reply_bytes=2**30):
        assert reply.has_content()
        del reply
    assert len(seen) == 3


def test_a_stop_is_seen_while_waiting():
    grid = FakeGrid({1: lambda request: None})
    sent = send_to(grid, 1)
    began = time.monotonic()
    ids = [s.message_id for s in sent.values()]
    assert list(receive(grid, ids, timeout_s=60, stop=lambda: time.monotonic() - began > 0.1)) == []
    assert time.monotonic() - began < 1
