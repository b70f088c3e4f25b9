"""What the supervisor makes of the server's answers, with a clock of our own."""

import pytest

from client.deployment.connection_watch import Action, ConnectionWatch
from client.server_answer import Answer, ServerState

FAULTS = [s for s in ServerState if s not in (ServerState.READY, ServerState.ONLINE)]


def answer(state: ServerState) -> Answer:
    return Answer(state=state, what=f"it is {state.value}", why="because", fix="do this")


class Clocked:
    """A watch and seconds; a SuperNode runs where `age` is a number."""

    def __init__(self):
        self.watch, self.now, self.age, self.let_in = ConnectionWatch(), 1000.0, None, True

    def hear(self, state, *, after=0.0, gave_up=False):
        self.now += after
        if self.age is not None:
            self.age += after
        step = self.watch.step(
            answer(state), now=self.now, running_s=self.age, was_let_in=self.let_in, gave_up=gave_up
        )
        if step.action in (Action.START, Action.RESTART):
            self.watch.started()
            self.age = 0.0
        return step


@pytest.fixture
def clocked():
    return Clocked()


@pytest.fixture
def connected(clocked):
    clocked.hear(ServerState.READY)
    clocked.hear(ServerState.ONLINE, after=3)
    assert clocked.watch.is_connected
    return clocked


def test_a_server_that_knows_the_key_lets_a_supernode_start(clocked):
    assert clocked.hear(ServerState.READY).action is Action.START
    step = clocked.hear(ServerState.ONLINE, after=3)
    assert (step.action, step.line.split(":")[0]) == (Action.NOTHING, "connected")
    assert clocked.hear(ServerState.ONLINE, after=10).line == ""


def test_one_that_still_starts_is_left_alone(clocked):
    clocked.hear(ServerState.READY)
    clocked.let_in = False
    assert clocked.hear(ServerState.READY, after=10).action is Action.NOTHING
    assert clocked.hear(ServerState.READY, after=10).action is Action.NOTHING


def test_one_that_does_nothing_is_started_anew_within_seconds(connected):
    assert connected.hear(ServerState.READY, after=10).action is Action.NOTHING
    step = connected.hear(ServerState.READY, after=2)
    assert step.action is Action.RESTART
    assert "offline" in step.line


def test_one_hiccup_is_no_reason(connected):
    connected.hear(ServerState.READY, after=10)
    assert connected.hear(ServerState.ONLINE, after=2).action is Action.NOTHING
    assert connected.hear(ServerState.READY, after=10).action is Action.NOTHING


def test_after_a_cut_of_the_network_the_heartbeat_has_time_to_come_back(connected):
    for _ in range(15):
        assert connected.hear(ServerState.UNREACHABLE, after=10).action is Action.NOTHING
    waited = 0
    while connected.hear(ServerState.READY, after=2).action is Action.NOTHING:
        waited += 2
        assert waited < 40
    assert waited >= 28


def test_one_that_gave_up_during_the_cut_is_not_waited_for(connected):
    connected.hear(ServerState.TIMEOUT, after=10)
    connected.hear(ServerState.READY, after=10, gave_up=True)
    assert connected.hear(ServerState.READY, after=2, gave_up=True).action is Action.RESTART


@pytest.mark.parametrize("state", FAULTS)
def test_no_fault_of_the_line_restarts_or_ends_a_running_one(connected, state):
    said = [connected.hear(state, after=10) for _ in range(30)]
    assert {step.action for step in said} == {Action.NOTHING}
    assert sum(bool(step.line) for step in said) == 1, "a fault is said once, not every ten seconds"
    assert not connected.watch.is_connected
    assert connected.watch.last_fault.startswith(("it is", "the server has gone"))
    assert all(step.ask_again_s <= 10 for step in said)


@pytest.mark.parametrize("state", FAULTS)
def test_the_first_answer_ends_only_what_a_person_must_mend(clocked, state):
    step = clocked.hear(state)
    assert (step.action is Action.GIVE_UP) == answer(state).needs_a_person
    assert step.line == "it is " + state.value + "\nbecause\ndo this"


def test_later_even_a_revoked_key_is_waited_for(connected):
    connected.age = None
    assert connected.hear(ServerState.REVOKED).action is Action.NOTHING


def test_an_old_session_is_waited_out_and_another_client_is_named(clocked):
    first = clocked.hear(ServerState.ONLINE)
    assert "old session" in first.line
    lines = [clocked.hear(ServerState.ONLINE, after=3).line for _ in range(40)]
    (news,) = [line for line in lines if line]
    assert "already connected from elsewhere" in news
    assert clocked.hear(ServerState.READY, after=3).action is Action.START
