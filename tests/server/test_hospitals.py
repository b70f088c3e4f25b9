import time
from types import SimpleNamespace

import pytest
from flwr.app import Error, Message

from common import messages
from common.errors import ConfigError, RefusalCode
from common.messages import Envelope, RoundKey
from server import hospitals as hospitals_module
from server.hospitals import Admission, Roster, await_hospitals
from tests.server.fake_federation import (
    FakeGrid,
    NumpyHospital,
    in_round,
    make_config,
    refuse,
    result_of,
    run,
    three_hospitals,
)

ENVELOPE = Envelope(key=RoundKey(run_id="run", attempt=1, round_number=0, model_hash="ab" * 32))


def names(roster):
    return [hospital.name for hospital in roster.present()]


def waiting(roster, **options):
    settings = {"quorum": 1, "expected": 0, "patience_s": 0.2, "stop": lambda: False} | options
    return await_hospitals(roster, ENVELOPE, **settings)


def test_the_roster_is_in_name_order_whatever_the_nodes():
    roster = Roster(FakeGrid(three_hospitals()))
    assert waiting(roster, expected=3)
    assert [(h.name, h.node_id, h.enrolled_patients) for h in roster.present()] == [
        ("a", 8, 100),
        ("b", 9, 200),
        ("c", 7, 300),
    ]


def test_a_known_hospital_is_greeted_once():
    grid = FakeGrid(three_hospitals())
    roster = Roster(grid)
    for _ in range(5):
        roster.greet(ENVELOPE)
    assert len(grid.sent) == 3


def test_taking_in_a_hospital_does_not_look_through_all_others():
    class Counting(FakeGrid):
        asked = 0

        def get_node_ids(self):
            self.asked += 1
            return super().get_node_ids()

    grid = Counting({n + 1: NumpyHospital(f"h{n:03d}") for n in range(60)})
    roster = Roster(grid)
    roster.greet(ENVELOPE)
    assert grid.asked < 5
    assert len(roster.present()) == 60


def introducing(**facts):
    def tamper(reply, request):
        for name, value in facts.items():
            reply.content[messages.HOSPITAL][name.replace("_", "-")] = value
        return reply

    return tamper


def without_introduction(reply, request):
    del reply.content[messages.HOSPITAL]
    return reply


def from_elsewhere(reply, request):
    reply.metadata.__dict__["_src_node_id"] = 1234
    return reply


BAD_INTRODUCTIONS = {
    "path as name": introducing(name="../../etc/x"),
    "empty name": introducing(name=""),
    "long name": introducing(name="x" * 65),
    "name with newline": introducing(name="a\n"),
    "name is a number": introducing(name=3),
    "no patients": introducing(enrolled_patients=0),
    "negative": introducing(enrolled_patients=-5),
    "a million million": introducing(enrolled_patients=10**12),
    "count is a bool": introducing(enrolled_patients=True),
    "count is a float": introducing(enrolled_patients=10.5),
    "other schema": introducing(schema_version=1),
    "nothing": without_introduction,
    "another sender": from_elsewhere,
    "refusal": lambda reply, request: messages.refusal(request, ENVELOPE, RefusalCode.DATA),
    "error": lambda reply, request: Message(Error(code=2, reason="DOE_JOHN"), reply_to=request),
}


@pytest.mark.parametrize("kind", BAD_INTRODUCTIONS)
def test_a_bad_introduction_is_left_out_and_nothing_it_says_is_logged(kind, caplog):
    caplog.set_level("INFO")
    roster = Roster(FakeGrid(three_hospitals(b=BAD_INTRODUCTIONS[kind])))
    assert waiting(roster, expected=3, quorum=2)
    assert names(roster) == ["a", "c"]
    assert "node 9 is not enrolled" in caplog.text
    assert "DOE_JOHN" not in caplog.text
    assert "etc" not in caplog.text


def test_a_node_that_could_not_be_enrolled_is_greeted_again_later(monkeypatch):
    versions = iter([1])
    late = three_hospitals(
        b=lambda reply, request: introducing(schema_version=next(versions, messages.SCHEMA_VERSION))(
            reply, request
        )
    )
    roster = Roster(FakeGrid(late))
    roster.greet(ENVELOPE)
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "c"]
    later = time.monotonic() + hospitals_module.ASK_AGAIN_S + 1
    monkeypatch.setattr(hospitals_module.time, "monotonic", lambda: later)
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "b", "c"]


def test_a_hello_that_went_down_with_its_node_is_said_again_soon(monkeypatch):
    lost = iter([True])

    def went_down(reply, request):
        return Message(Error(code=5), reply_to=request) if next(lost, False) else reply

    roster = Roster(FakeGrid(three_hospitals(b=went_down)))
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "c"]
    later = time.monotonic() + 3.0
    monkeypatch.setattr(hospitals_module.time, "monotonic", lambda: later)
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "b", "c"]


def test_a_second_node_cannot_take_the_name_of_a_connected_hospital():
    grid = FakeGrid({1: NumpyHospital("a", 100)})
    roster = Roster(grid)
    roster.greet(ENVELOPE)
    grid.hospitals[2] = NumpyHospital("a", 100)
    roster.greet(ENVELOPE)
    assert [h.node_id for h in roster.present()] == [1]


def test_a_hospital_that_comes_back_as_a_new_node_keeps_its_place():
    grid = FakeGrid({1: NumpyHospital("a", 100)})
    roster = Roster(grid)
    roster.greet(ENVELOPE)
    grid.hospitals = {2: NumpyHospital("a", 100)}
    assert names(roster) == []
    roster.greet(ENVELOPE)
    assert [(h.name, h.node_id) for h in roster.present()] == [("a", 2)]


def test_the_enrolled_count_is_bound_for_the_run():
    grid = FakeGrid({1: NumpyHospital("a", 101), 2: NumpyHospital("b", 50)})
    roster = Roster(grid, enrolled={"a": 100})
    roster.greet(ENVELOPE)
    assert names(roster) == ["b"]


def test_whoever_left_for_the_budget_is_connected_but_not_asked():
    roster = Roster(FakeGrid(three_hospitals()))
    roster.greet(ENVELOPE)
    assert not roster.all_have_left
    for name in ("a", "b", "c"):
        roster.leave(name)
    assert names(roster) == []
    assert [hospital.name for hospital in roster.connected()] == ["a", "b", "c"]
    assert roster.all_have_left


def test_nobody_met_is_not_everybody_left():
    assert not Roster(FakeGrid({})).all_have_left


def test_patience_ends_the_waiting_and_says_whether_the_quorum_is_there():
    silent = lambda reply, request: None  # noqa: E731
    began = time.monotonic()
    assert waiting(Roster(FakeGrid(three_hospitals(a=silent))), expected=3, quorum=2)
    assert not waiting(Roster(FakeGrid(three_hospitals(a=silent))), expected=3, quorum=3)
    assert 0.4 <= time.monotonic() - began < 2


def test_everybody_expected_is_waited_for_even_above_the_quorum():
    grid = FakeGrid(three_hospitals())
    grid.hospitals.pop(8)
    roster, began = Roster(grid), time.monotonic()

    def third_arrives():
        if time.monotonic() - began > 0.15:
            grid.hospitals |= three_hospitals()
        return False

    assert waiting(roster, expected=3, quorum=1, patience_s=5.0, stop=third_arrives)
    assert names(roster) == ["a", "b", "c"]


def test_a_stop_ends_the_waiting():
    began = time.monotonic()
    assert not waiting(Roster(FakeGrid({})), patience_s=60.0, stop=lambda: True)
    assert time.monotonic() - began < 1


ENTRIES = {7: ("c", 300), 8: ("a", 100), 9: ("b", 200)}


def admitting(entries, **versions):
    def enrolled_as(node_id):
        entry = entries.get(node_id)
        return entry and SimpleNamespace(name=entry[0], enrolled_patients=entry[1])

    return Admission(enrolled_as=enrolled_as, versions={"version": "0.1.0", **versions})


def test_whoever_is_as_enrolled_is_taken_in():
    roster = Roster(FakeGrid(three_hospitals()), admission=admitting(ENTRIES))
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "b", "c"]


@pytest.mark.parametrize(
    ("entries", "versions", "words"),
    [
        ({7: ("c", 300), 8: ("a", 100)}, {}, "its key is not on the roster"),
        (ENTRIES | {9: ("d", 200)}, {}, "its key is that of d, and it gives another name"),
        (ENTRIES | {9: ("b", 210)}, {}, "another count of patients than the roster's 210"),
    ],
)
def test_whoever_is_not_as_enrolled_is_left_out(entries, versions, words, caplog):
    roster = Roster(FakeGrid(three_hospitals()), admission=admitting(entries, **versions))
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "c"]
    assert words in caplog.text


@pytest.mark.parametrize("says", [200, 240])
def test_a_count_that_was_changed_since_the_run_began_locks_nobody_out(says):
    changed = ENTRIES | {9: ("b", 240)}
    grid = FakeGrid(three_hospitals(b=introducing(enrolled_patients=says)))
    roster = Roster(grid, enrolled={"b": 200}, admission=admitting(changed))
    roster.greet(ENVELOPE)
    (b,) = [h for h in roster.present() if h.name == "b"]
    assert (b.enrolled_patients, b.stated_patients) == (200, says)
    assert roster.enrolled["b"] == 200
    other = FakeGrid(three_hospitals(b=introducing(enrolled_patients=300)))
    never = Roster(other, enrolled={"b": 200}, admission=admitting(changed))
    never.greet(ENVELOPE)
    assert names(never) == ["a", "c"]


def test_another_release_is_left_out_unless_the_operator_allows_it(caplog):
    newer = three_hospitals(b=introducing(version="0.2.0"))
    roster = Roster(FakeGrid(newer), admission=admitting(ENTRIES))
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "c"]
    assert "b runs another release of hospital-federation than 0.1.0" in caplog.text
    assert "0.2.0" not in caplog.text
    anything = Admission(enrolled_as=admitting(ENTRIES).enrolled_as, versions={})
    roster = Roster(FakeGrid(newer), admission=anything)
    roster.greet(ENVELOPE)
    assert names(roster) == ["a", "b", "c"]
    no_flower = Roster(FakeGrid(three_hospitals()), admission=admitting(ENTRIES, flwr="1.41.0"))
    no_flower.greet(ENVELOPE)
    assert names(no_flower) == []


def test_a_roster_needs_an_engine_that_knows_keys(tmp_path):
    config = make_config(tmp_path / "run", runtime={"roster": "roster.json"})
    with pytest.raises(ConfigError, match="cannot be kept here"):
        run(config, FakeGrid(three_hospitals()))


def test_hospitals_that_have_left_are_not_asked_again(tmp_path):
    left = {n: in_round(2, refuse(RefusalCode.LEFT)) for n in ("a", "b", "c")}
    grid = FakeGrid(three_hospitals(**left))
    run(make_config(tmp_path / "run", server={"quorum": 1, "patience-s": 30.0}), grid)
    assert result_of(tmp_path / "run")["status"] == "quorum-lost"
    assert [len(hospital.asked) for hospital in grid.hospitals.values()] == [2, 2, 2]
