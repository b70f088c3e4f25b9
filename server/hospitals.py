"""Who takes part: hospitals introduce themselves, the roster keeps their names, the quorum waits for them."""

import logging
import re
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

from flwr.app import ConfigRecord, Message, RecordDict
from flwr.serverapp import Grid

from common import messages
from common.errors import RefusalCode, WireError
from common.messages import SCHEMA_VERSION, Envelope
from common.names import NAME
from server.exchange import LONGEST_PAUSE_S, SHORTEST_PAUSE_S, send

HELLO_TTL_S = 600.0
ASK_AGAIN_S = 60.0
"""A node that refused, failed or could not be enrolled is greeted again after this."""
_NODE_UNAVAILABLE, _SOON_S = 5, 2.0
"""Flower's code for a message that went down with its node: the next one may arrive."""
GRACE_S = 30.0
"""Without a number of expected hospitals: how long connected but silent nodes hold up round 1."""
_NAME = re.compile(NAME)
_LARGEST_COUNT = 10**9

log = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class Hospital:
    """A hospital on the roster; everything here is public."""

    name: str
    node_id: int
    enrolled_patients: int
    """The rounded public count: its weight in the average, bound for the whole run."""
    own_count: int | None = None
    """The count that it works with, where the operator has changed it since the run bound another one."""

    @property
    def stated_patients(self) -> int:
        """The count that its updates must state, and are scaled by."""
        return self.own_count or self.enrolled_patients


class Enrolled(Protocol):
    """What the operator's roster says of a key."""

    @property
    def name(self) -> str:
        """Name of the hospital."""

    @property
    def enrolled_patients(self) -> int:
        """Its rounded public count."""


@dataclass(frozen=True, kw_only=True)
class Admission:
    """Whom this run takes in: what a hospital says of itself must be what the operator enrolled."""

    enrolled_as: Callable[[int], Enrolled | None]
    """The roster's entry for the key that a connected node has proved."""
    versions: Mapping[str, str]
    """What a hospital must run, as in its hello (`version`, `flwr`); empty takes in any release."""

    def check(self, hospital: Hospital, facts: ConfigRecord, *, bound: int | None = None) -> None:
        """Raise WireError unless the hospital is the one whose key it holds, with the agreed releases.

        `bound` is the count that the run has for it already: the roster's may have changed since.
        """
        entry = self.enrolled_as(hospital.node_id)
        if entry is None:
            raise WireError("its key is not on the roster")
        if hospital.name != entry.name:
            raise WireError(f"its key is that of {entry.name}, and it gives another name")
        if hospital.enrolled_patients not in (entry.enrolled_patients, bound):
            raise WireError(
                f"{entry.name} gives another count of patients than the roster's {entry.enrolled_patients}"
            )
        for key, version in self.versions.items():
            if facts.get(key) != version:
                raise WireError(f"{entry.name} runs another {_WORDS.get(key, key)} than {version}")


_WORDS = {"version": "release of hospital-federation", "flwr": "release of Flower"}


class Roster:
    """The hospitals of this run, by Flower node; the names are sorted wherever order matters."""

    def __init__(
        self, grid: Grid, *, enrolled: Mapping[str, int] | None = None, admission: Admission | None = None
    ) -> None:
        self._grid = grid
        self._admission = admission
        self._enrolled = dict(enrolled or {})
        self._by_node: dict[int, Hospital] = {}
        self._node_of: dict[str, int] = {}
        self._greeted: dict[str, tuple[int, float]] = {}
        self._ask_again_at: dict[int, float] = {}
        self._left: dict[str, RefusalCode] = {}

    def greet(self, envelope: Envelope) -> None:
        """Send a hello to nodes not yet known and take in the answers that are there; never waits."""
        now = time.monotonic()
        self._greeted = {i: (node, until) for i, (node, until) in self._greeted.items() if until > now}
        waiting = {node for node, _ in self._greeted.values()}
        new = [
            node_id
            for node_id in sorted(self._grid.get_node_ids())
            if node_id not in self._by_node
            and node_id not in waiting
            and self._ask_again_at.get(node_id, 0.0) <= now
        ]
        contents = {node_id: RecordDict({messages.ENVELOPE: envelope.to_record()}) for node_id in new}
        sent = send(self._grid, contents, message_type=messages.HELLO, group="hello", ttl_s=HELLO_TTL_S)
        for node_id, request in sent.items():
            self._greeted[request.message_id] = (node_id, now + HELLO_TTL_S)
        if self._greeted:
            for reply in self._grid.pull_messages(list(self._greeted)):
                self._take_in(reply)

    def present(self) -> list[Hospital]:
        """Connected hospitals that may be asked, in name order."""
        return [hospital for hospital in self.connected() if hospital.name not in self._left]

    def connected(self) -> list[Hospital]:
        """Connected hospitals in name order, those that have left included."""
        nodes = set(self._grid.get_node_ids())
        here = [hospital for node_id, hospital in self._by_node.items() if node_id in nodes]
        return sorted(here, key=lambda hospital: hospital.name)

    def leave(self, name: str, code: RefusalCode = RefusalCode.BUDGET) -> None:
        """Never ask this hospital again in this session: its budget is spent, or it has left."""
        self._left[name] = code

    @property
    def enrolled(self) -> dict[str, int]:
        """Enrolled count of every hospital that ever introduced itself in this run, by name."""
        return dict(sorted(self._enrolled.items()))

    @property
    def all_have_left(self) -> bool:
        """Whether every hospital ever met has spent its budget or left."""
        names = {hospital.name for hospital in self._by_node.values()}
        return bool(names) and names <= set(self._left)

    @property
    def budget_is_spent(self) -> bool:
        """Whether a budget was the reason of one that left."""
        return RefusalCode.BUDGET in self._left.values()

    @property
    def num_answered(self) -> int:
        """Nodes that have answered a hello, be it with a refusal."""
        return len(self._by_node) + len(self._ask_again_at)

    @property
    def is_settled(self) -> bool:
        """Whether no hello is still unanswered."""
        return not self._greeted

    def _take_in(self, reply: Message) -> None:
        request_id = reply.metadata.reply_to_message_id
        if request_id not in self._greeted:
            return
        node_id, _ = self._greeted.pop(request_id)
        try:
            hospital = self._enrol(self._admit(reply, node_id))
        except WireError as error:
            log.warning("node %d is not enrolled: %s", node_id, error.what)
            went_down = reply.has_error() and reply.error.code == _NODE_UNAVAILABLE
            self._ask_again_at[node_id] = time.monotonic() + (_SOON_S if went_down else ASK_AGAIN_S)
            return
        self._ask_again_at.pop(node_id, None)
        self._by_node[node_id] = hospital
        self._node_of[hospital.name] = node_id
        log.info("hospital %s is here with %d enrolled", hospital.name, hospital.enrolled_patients)

    def _admit(self, reply: Message, node_id: int) -> Hospital:
        hospital = _introduction(reply, node_id)
        facts = reply.content[messages.HOSPITAL]
        if self._admission is None or not isinstance(facts, ConfigRecord):
            return hospital
        bound, count = self._enrolled.get(hospital.name), hospital.enrolled_patients
        self._admission.check(hospital, facts, bound=bound)
        if bound is None or bound == count:
            return hospital
        log.info("%s keeps its weight of %d in this run, not %d", hospital.name, bound, count)
        return replace(hospital, enrolled_patients=bound, own_count=count)

    def _enrol(self, hospital: Hospital) -> Hospital:
        holder = self._node_of.get(hospital.name)
        if holder is not None and holder in self._grid.get_node_ids():
            raise WireError("its name is that of a hospital that is connected")
        if self._enrolled.setdefault(hospital.name, hospital.enrolled_patients) != hospital.enrolled_patients:
            raise WireError("its enrolled count differs from the one it gave before in this run")
        if holder is not None:  # the same hospital, back as a new node
            del self._by_node[holder]
        return hospital


def await_hospitals(
    roster: Roster,
    envelope: Envelope,
    *,
    quorum: int,
    expected: int,
    patience_s: float,
    stop: Callable[[], bool],
) -> bool:
    """Wait until everybody expected has answered, at most `patience_s`; says whether the quorum is here."""
    began = time.monotonic()
    pause = SHORTEST_PAUSE_S
    while not stop():
        roster.greet(envelope)
        waited_s = time.monotonic() - began
        enough = len(roster.present()) >= quorum
        everybody = roster.num_answered >= expected if expected else roster.is_settled or waited_s >= GRACE_S
        if enough and everybody or waited_s >= patience_s:
            return enough
        time.sleep(pause)
        pause = min(LONGEST_PAUSE_S, 2 * pause)
    return False


def _introduction(reply: Message, node_id: int) -> Hospital:
    """Read a hello's answer; raises WireError whose text holds nothing that the hospital wrote."""
    if reply.has_error():
        raise WireError(f"its app answered with Flower error {reply.error.code}")
    if reply.metadata.src_node_id != node_id:
        raise WireError("another node answered for it")
    if (code := messages.refusal_code(reply.content)) is not None:
        raise WireError(f"it refused with {code.value}")
    try:
        Envelope.from_record(reply.content)
    except WireError:
        raise WireError(f"its envelope cannot be read ({RefusalCode.SCHEMA.value})") from None
    record = reply.content.get(messages.HOSPITAL)
    if not isinstance(record, ConfigRecord):
        raise WireError("its introduction is missing")
    name, enrolled = record.get("name"), record.get("enrolled-patients")
    if record.get("schema-version") != SCHEMA_VERSION:
        raise WireError(f"its wire schema is not {SCHEMA_VERSION} ({RefusalCode.SCHEMA.value})")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise WireError("its name is not one of letters, digits, dot, dash and underscore")
    if type(enrolled) is not int or not 1 <= enrolled <= _LARGEST_COUNT:
        raise WireError("its enrolled count is not a whole number of at least 1")
    return Hospital(name=name, node_id=node_id, enrolled_patients=enrolled)
