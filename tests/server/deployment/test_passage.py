"""Pieces of a model at the front: few at the SuperLink at once, large ones on the disk, slow links alone."""

import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from server.deployment import front as front_module
from server.deployment import passage
from server.deployment.front import FLEET
from server.deployment.passage import AT_ONCE
from tests.server.deployment import front_door
from tests.server.deployment.front_door import ONE_MB, Upstream, head

door, people, tls = front_door.door, front_door.people, front_door.tls
PIECE = os.urandom(3 * ONE_MB)
PUSHED = b"\x22\xf8\xff\x3f" + b"x" * (ONE_MB - 8)
"""The content of an object that is pushed, in protobuf: just under 1 MB."""


def wait_for(holds):
    give_up_at = time.monotonic() + 9
    while not holds():
        assert time.monotonic() < give_up_at
        time.sleep(0.005)


class Counting(Upstream):
    """How many calls it has at once, by path."""

    def __init__(self):
        super().__init__()
        self.now, self.most = {}, {}

    async def __call__(self, scope, receive, send):
        path = scope["path"]
        self.now[path] = self.now.get(path, 0) + 1
        self.most[path] = max(self.most.get(path, 0), self.now[path])
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.now[path] -= 1


@pytest.fixture
def counting(tls, people, tmp_path):
    upstream = Counting()
    upstream.answers[FLEET + "pull-object"] = (200, PIECE)
    upstream.pause_s = 0.15
    with front_door.Door(tls, people, tmp_path, upstream, max_requests=40) as door:
        yield door


@pytest.mark.parametrize(("call", "body"), [("pull-object", b""), ("push-object", PUSHED)])
def test_few_pieces_are_at_the_superlink_at_once_and_all_get_through(counting, call, body):
    with ThreadPoolExecutor(12) as many:
        answers = list(many.map(lambda by: counting.post(call, body, by=by).status_code, "ab" * 6))
    assert answers == [200] * 12
    assert counting.upstream.most[FLEET + call] == AT_ONCE


def test_small_calls_do_not_wait_for_pieces(counting):
    counting.upstream.pause_s = 1.0
    with ThreadPoolExecutor(3 * AT_ONCE) as many:
        pieces = [many.submit(counting.post, "pull-object") for _ in range(3 * AT_ONCE)]
        while counting.upstream.now.get(FLEET + "pull-object", 0) < AT_ONCE:
            time.sleep(0.01)
        assert counting.post("send-node-heartbeat", by="b").status_code == 200
        assert sum(one.done() for one in pieces) <= AT_ONCE
        assert all(one.result().status_code == 200 for one in pieces)


def test_a_slow_link_holds_no_place(counting):
    """It reads nothing of its piece; those of others come all the same, and its own is whole in the end."""
    request = head("pull-object", 0, counting.people["a"].headers())
    slow = [counting.connect() for _ in range(2 * AT_ONCE)]
    for connection in slow:
        connection.sendall(request)
    while counting.upstream.now.get(FLEET + "pull-object", 0):
        time.sleep(0.01)
    assert counting.post("pull-object", by="b").content == PIECE
    for connection in slow:
        received = b""
        while len(received) < len(PIECE):
            received += connection.recv(2**16)
        assert received.partition(b"\r\n\r\n")[2] == PIECE[: len(received.partition(b"\r\n\r\n")[2])]
        connection.close()


def test_who_waits_too_long_is_told_to_come_again(counting, monkeypatch):
    monkeypatch.setattr(counting.front._passage, "_longest_wait_s", 0.2)
    counting.upstream.pause_s = 1.0
    with ThreadPoolExecutor(2 * AT_ONCE) as many:
        codes = sorted(
            one.status_code for one in many.map(lambda _: counting.post("pull-object"), range(2 * AT_ONCE))
        )
    assert codes == [200] * AT_ONCE + [503] * AT_ONCE
    assert counting.post("pull-object").status_code == 200


def test_large_bodies_are_files_without_a_name(counting, tmp_path):
    def parked():
        names = []
        for entry in Path("/proc/self/fd").iterdir():
            try:
                names.append(os.readlink(entry))
            except OSError:
                continue
        return [name for name in names if name.startswith(str(tmp_path)) and name.endswith("(deleted)")]

    counting.upstream.may_answer.clear()
    with ThreadPoolExecutor(1) as one:
        try:
            asking = one.submit(counting.post, "push-object", PUSHED)
            wait_for(lambda: parked() or asking.done())
            assert not asking.done(), asking.result()
        finally:
            counting.upstream.may_answer.set()
    assert asking.result().status_code == 200
    wait_for(lambda: not parked())
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("tmp")]
    assert counting.front._intake.held == 0


def test_the_settings_of_operation_fit_together():
    """Within a SuperNode's 30 s: the wait and the SuperLink's own time."""
    assert passage.LONGEST_WAIT_S + 12 < 30
    assert front_module.Passage().__dict__["_slots"]._value == AT_ONCE
