"""When the Grid looks for replies, for whom, and what it makes of them; the SuperLink is an object here."""

import time

import httpx
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict
from flwr.proto.message_pb2 import Message as MessageProto
from flwr.proto.message_pb2 import Metadata, ObjectTree, PullObjectResponse
from flwr.proto.node_pb2 import NodeInfo
from flwr.proto.runtime_pb2 import PullAppMessagesResponse
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_id, get_object_tree
from flwr.supercore.run import Run
from flwr.superlink.grid import HttpGrid

from common.node_keys import load_public_key, make_key
from server.deployment.federation_grid import (
    AWAY_S,
    LOOK_AGAIN_S,
    NODE_UNAVAILABLE,
    SENDING_S,
    FederationGrid,
)
from server.deployment.news import Kind, News
from server.deployment.replies import REPLY_UNUSABLE
from server.provisioning.roster import enroll, new_roster

ID = "ab" * 32
RUN, NODE, SERVER = 3, 7, 1


class SuperLink:
    """Heads are handed out once; objects lie in `objects`, None while they are to come."""

    def __init__(self):
        self.asked, self.replies, self.objects, self.confirmed = [], {}, {}, []
        self.broken: Exception | None = None

    def PullMessages(self, request):
        if self.broken:
            raise self.broken
        self.asked.append(list(request.message_ids))
        there = [self.replies.pop(i) for i in request.message_ids if i in self.replies]
        return PullAppMessagesResponse(
            messages_list=[head for head, _ in there], message_object_trees=[tree for _, tree in there]
        )

    def PullObject(self, request):
        content = self.objects.get(request.object_id, b"")
        return PullObjectResponse(
            object_found=request.object_id in self.objects,
            object_available=content is not None,
            object_content=content or b"",
        )

    def ConfirmMessageReceived(self, request):
        self.confirmed.append(request.message_object_id)

    def holds(self, root, tree, *, sender=NODE, to=ID):
        head = Metadata(run_id=RUN, message_id=root, src_node_id=sender, dst_node_id=SERVER)
        head.reply_to_message_id, head.message_type = to, "train"
        self.replies[to] = (MessageProto(metadata=head), tree)

    def holds_object(self, content, **more):
        root = get_object_id(content)
        self.objects[root] = content
        self.holds(root, ObjectTree(object_id=root), **more)

    def holds_reply(self, *, inner_sender=NODE, inner_to=ID, **more):
        request = Message(RecordDict(), inner_sender, "train", ttl=60.0, group_id="1")
        request.metadata.__dict__.update(_message_id=inner_to, _run_id=RUN, _src_node_id=SERVER)
        content = RecordDict({"a": ArrayRecord({"w": Array("uint8", (1,), "x", b"1")}), "c": ConfigRecord()})
        reply = Message(content, reply_to=request)
        root = reply.object_id
        self.objects |= {i: one.deflate() for i, one in get_all_nested_objects(reply).items()}
        self.holds(root, get_object_tree(reply), **more)
        return root


def junk(kind, body, children=()):
    return f"{kind} {','.join(children)} {len(body)}".encode() + b"\0" + body


@pytest.fixture
def at(tmp_path, monkeypatch, flower_identity):
    """A grid with one enrolled node, a message on its way to it, and a clock of ours."""
    make_key(tmp_path / "key", tmp_path / "key.pub", comment="a")
    key = load_public_key(tmp_path / "key.pub")
    new_roster(tmp_path / "roster.json")
    enroll(tmp_path / "roster.json", name="a", key=key, enrolled_patients=10)

    class Scene:
        now, superlink = 0.0, SuperLink()
        online = [NodeInfo(node_id=NODE, public_key=key.pem, status="online")]
        news = News(tmp_path / "replies")

    def push(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = ID
        return [ID for _ in messages]

    monkeypatch.setattr(HttpGrid, "push_messages", push)
    monkeypatch.setattr(HttpGrid, "get_nodes", lambda self: Scene.online)
    grid = FederationGrid(
        "127.0.0.1:1",
        authority=b"",
        token="t",
        roster=tmp_path / "roster.json",
        state=tmp_path,
        clock=lambda: Scene.now,
    )
    grid._client = Scene.superlink
    grid.set_run(Run.create_empty(run_id=RUN))
    Scene.grid = grid
    assert list(grid.get_node_ids()) == [NODE]
    grid.push_messages([Message(RecordDict(), NODE, "train", ttl=60.0, group_id="1")])
    assert time.time_ns() - (tmp_path / "bell").stat().st_mtime_ns < 10**9
    return Scene


def looks(at):
    at.superlink.asked.clear()
    replies = list(at.grid.pull_messages([ID]))
    return [ID] in at.superlink.asked, replies


def test_nothing_is_asked_until_there_is_news_or_time_has_passed(at):
    assert looks(at)[0] is False
    at.now = LOOK_AGAIN_S
    assert looks(at)[0] is True
    assert looks(at)[0] is False
    at.news.tell(Kind.WHOLE, "cd" * 32)
    assert looks(at)[0] is False
    at.news.tell(Kind.WHOLE, ID)
    assert looks(at)[0] is True
    assert looks(at)[0] is False


def test_a_reply_that_is_on_its_way_is_left_alone_until_it_is_whole(at):
    at.news.tell(Kind.BEGUN, ID)
    assert looks(at)[0] is False
    at.now = SENDING_S - 1
    assert looks(at)[0] is False
    at.news.tell(Kind.WHOLE, ID)
    assert looks(at)[0] is True


def test_a_reply_that_never_becomes_whole_is_looked_for_in_the_end(at):
    at.news.tell(Kind.BEGUN, ID)
    looks(at)
    at.now = SENDING_S + 1
    assert looks(at)[0] is True


def test_a_hospital_that_is_back_soon_keeps_its_place(at):
    at.online, back = [], at.online
    at.now = LOOK_AGAIN_S
    assert looks(at)[0] is False  # Flower would call it gone and drop its reply
    at.now += AWAY_S - 1
    assert looks(at)[0] is False
    at.online = back
    at.news.tell(Kind.WHOLE, ID)
    assert looks(at)[0] is True


def test_a_hospital_that_stays_away_is_given_up(at):
    at.online, at.now = [], LOOK_AGAIN_S
    assert looks(at)[0] is False
    at.now += AWAY_S + LOOK_AGAIN_S
    assert looks(at)[0] is True


def test_a_message_that_went_down_with_its_supernode_is_answered_here(at):
    at.news.tell(Kind.LOST, ID)
    asked, (reply,) = looks(at)
    assert asked is False
    assert reply.error.code == NODE_UNAVAILABLE
    assert reply.metadata.reply_to_message_id == ID
    assert reply.metadata.src_node_id == 7


def test_a_roster_that_is_damaged_meanwhile_is_left_as_it_was(at, tmp_path, caplog):
    (tmp_path / "roster.json").write_text("{")
    at.now = 10.0
    assert list(at.grid.get_node_ids()) == [7]
    assert "left as it was" in caplog.text


def test_a_whole_reply_is_taken_in_and_the_superlink_may_forget_it(at):
    root = at.superlink.holds_reply()
    at.news.tell(Kind.WHOLE, ID)
    _, (reply,) = looks(at)
    assert set(reply.content) == {"a", "c"}
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == (ID, NODE)
    assert at.superlink.confirmed == [root]
    at.now += LOOK_AGAIN_S
    assert looks(at) == (False, [])


CHILD = junk("Array", b"\xff\xfe")
UNUSABLE = {
    "junk": junk("Message", b"\xff\xff junk"),
    "no message": junk("ConfigRecord", b"{}"),
    "of no kind": junk("Exploit", b""),
    "broken part": junk("Message", b"", [get_object_id(CHILD)]),
    "no head": b"\xff",
}


@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_malformed_reply_becomes_an_error_reply_and_nothing_else_suffers(at, kind, caplog):
    at.superlink.objects[get_object_id(CHILD)] = CHILD
    at.superlink.holds_object(UNUSABLE[kind])
    at.news.tell(Kind.WHOLE, ID)
    _, (reply,) = looks(at)
    assert reply.error.code == REPLY_UNUSABLE
    assert (reply.metadata.reply_to_message_id, reply.metadata.src_node_id) == (ID, NODE)
    assert at.superlink.confirmed == [get_object_id(UNUSABLE[kind])]
    assert f"node {NODE} is unusable" in caplog.text


@pytest.mark.parametrize("lie", [{"inner_sender": 8}, {"inner_to": "cd" * 32}, {"sender": SERVER}])
def test_a_reply_in_the_name_of_another_is_an_error_reply(at, lie):
    at.superlink.holds_reply(**lie)
    at.news.tell(Kind.WHOLE, ID)
    _, (reply,) = looks(at)
    assert reply.error.code == REPLY_UNUSABLE
    assert reply.metadata.reply_to_message_id == ID


def test_a_reply_with_missing_objects_is_never_waited_for_and_not_lost(at):
    root = at.superlink.holds_reply()
    content, at.superlink.objects[root] = at.superlink.objects[root], None
    at.news.tell(Kind.WHOLE, ID)  # as the front may believe
    began = time.monotonic()
    assert looks(at) == (True, [])
    assert time.monotonic() - began < 1
    at.now += LOOK_AGAIN_S
    assert looks(at) == (False, [])  # Flower has handed the head over, and would not again
    at.superlink.objects[root] = content
    at.news.tell(Kind.WHOLE, ID)
    assert len(looks(at)[1]) == 1


def test_a_reply_whose_objects_never_come_is_given_up_after_its_last_sign(at):
    root = at.superlink.holds_reply()
    at.superlink.objects[root] = None
    at.now = LOOK_AGAIN_S
    assert looks(at) == (True, [])
    at.now += SENDING_S - 1
    at.news.tell(Kind.BEGUN, ID)
    assert looks(at) == (False, [])
    at.now += SENDING_S - 1
    assert looks(at) == (False, [])
    at.now += 1
    assert looks(at)[1][0].error.code == REPLY_UNUSABLE
    assert at.superlink.confirmed == [root]


def test_an_error_of_the_connection_is_no_matter_of_the_reply(at):
    at.superlink.broken = httpx.ConnectError("gone")
    at.news.tell(Kind.WHOLE, ID)
    with pytest.raises(httpx.ConnectError):
        looks(at)


def test_messages_that_nobody_asks_for_any_more_are_forgotten(at):
    at.now = 2 * 60 + SENDING_S + 1
    at.grid.push_messages([])
    assert looks(at) == (False, [])
    assert at.grid._pending == {}
