"""When the Grid looks for replies, and for whom; the SuperLink is a list here."""

import time

import pytest
from flwr.app import Message, RecordDict
from flwr.proto.node_pb2 import NodeInfo
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
from server.provisioning.roster import enroll, new_roster

ID = "ab" * 32


@pytest.fixture
def at(tmp_path, monkeypatch, flower_identity):
    """A grid with one enrolled node, a message on its way to it, and a clock of ours."""
    make_key(tmp_path / "key", tmp_path / "key.pub", comment="a")
    key = load_public_key(tmp_path / "key.pub")
    new_roster(tmp_path / "roster.json")
    enroll(tmp_path / "roster.json", name="a", key=key, enrolled_patients=10)

    class Scene:
        now, asked, replies = 0.0, [], []
        online = [NodeInfo(node_id=7, public_key=key.pem, status="online")]
        news = News(tmp_path / "replies")

    def push(self, messages):
        for message in messages:
            message.metadata.__dict__["_message_id"] = ID
        return [ID for _ in messages]

    def pull(self, ids):
        Scene.asked.append(list(ids))
        return list(Scene.replies)

    monkeypatch.setattr(HttpGrid, "push_messages", push)
    monkeypatch.setattr(HttpGrid, "pull_messages", pull)
    monkeypatch.setattr(HttpGrid, "get_nodes", lambda self: Scene.online)
    grid = FederationGrid(
        "127.0.0.1:1",
        authority=b"",
        token="t",
        roster=tmp_path / "roster.json",
        state=tmp_path,
        clock=lambda: Scene.now,
    )
    Scene.grid = grid
    assert list(grid.get_node_ids()) == [7]
    grid.push_messages([Message(RecordDict(), 7, "train", ttl=60.0, group_id="1")])
    assert time.time_ns() - (tmp_path / "bell").stat().st_mtime_ns < 10**9
    yield Scene
    Scene.asked, Scene.replies = [], []


def looks(at):
    at.asked.clear()
    replies = list(at.grid.pull_messages([ID]))
    return [ID] in at.asked, replies


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
