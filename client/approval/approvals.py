"""What a person at the hospital has approved: plans of runs, and single updates before they leave.

With `policy.approval = "plan"` nothing of a run is trained before a person has approved exactly its plan:
run, digest, rounds and epsilon. With `"update"` each sealed answer waits for a person as well, up to the
round's deadline. What waits and what was approved are files under `state/approvals/RUN`, written whole or not
at all, readable by their owner only; `flower-client approve` reads and writes them. A file that cannot be
read approves nothing.
"""

import hashlib
import json
import os
import pwd
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from client.approval.records import Approval, PendingPlan, PendingUpdate, plan_digest
from client.ledger.records import TRAINING
from client.outbox import SealedAnswer
from common.config import PublicPlan
from common.errors import ConfigError, Refusal, RefusalCode
from common.files import append_line, write_json_atomically
from common.messages import EPSILON, RoundKey
from common.settings import parse, to_nested

FOLDER, HISTORY = "approvals", "approvals.jsonl"
_PLAN, _APPROVED, _WAITING, _RELEASED = "plan.json", "approved.json", "waiting.json", "released.json"
_MOST_RUNS = 100
"""Plans that wait; a server that invents runs cannot fill the disk."""
_POLL_S = 0.5
_TRAVEL_S, _TRAVEL_SHARE = 10.0, 0.1
"""What is left of a deadline when waiting ends, so that the answer still arrives: the smaller of the two."""
R = TypeVar("R")


class Approvals:
    """The approvals of one hospital, in its state folder."""

    def __init__(self, state: Path, *, hospital: Path) -> None:
        """`hospital` is its folder, named where a person is told what to type."""
        self._folder, self._hospital = state / FOLDER, hospital

    def require(self, key: RoundKey, plan: PublicPlan, *, trains: bool = True) -> Approval:
        """The approval under which this round may be trained; writes down what waits where there is none.

        Raises Refusal(APPROVAL). Nothing private is read for it.
        """
        digest = plan_digest(plan, key.run_id)
        approval = self.approval(key.run_id)
        if approval is None:
            reason = "nobody has approved this run"
        elif approval.digest != digest:
            reason = "the plan is another one than was approved"
        elif trains and key.round_number > approval.rounds:
            reason = f"round {key.round_number} is beyond the {approval.rounds} that were approved"
        else:
            return approval
        self.ask(key, plan, reason)
        raise _not_approved(reason, f"{self.command(key.run_id)} approves it")

    def require_evaluation(self, key: RoundKey, plan: PublicPlan, *, earlier: int) -> Approval:
        """The approval under which the model may be scored once more, after `earlier` times in this run.

        Raises Refusal: METRICS where a person approved training only, else APPROVAL as `require`.
        """
        approval = self.require(key, plan, trains=False)
        if approval.evaluations == 0:
            raise Refusal(
                RefusalCode.METRICS,
                "this run was approved without evaluations",
                why=f"{approval.by} approved its training only",
                fix=f"{self.command(key.run_id)}, without --no-evaluation, approves them too",
            )
        if earlier < approval.evaluations:
            return approval
        reason = f"{approval.evaluations} evaluation(s) were approved, and this would be one more"
        self.ask(key, plan, reason)
        raise _not_approved(reason, f"{self.command(key.run_id)} approves what the plan asks")

    def beyond(self, key: RoundKey, plan: PublicPlan, refusal: Refusal) -> Refusal:
        """Write down that more was asked than a person has approved; `refusal`, saying what to type."""
        self.ask(key, plan, refusal.what)
        fix = f"{self.command(key.run_id)} shows and approves what the plan costs"
        return Refusal(refusal.code, refusal.what, why=refusal.why, fix=fix)

    def command(self, run_id: str) -> str:
        """What a person types about this run."""
        return f"flower-client approve {self._hospital} {run_id}"

    def ask(self, key: RoundKey, plan: PublicPlan, reason: str) -> None:
        """Write down that a person is to look at this plan."""
        self._bound()
        content = {
            "run": key.run_id,
            "digest": plan_digest(plan, key.run_id),
            "plan": to_nested(plan),
            "round_number": key.round_number,
            "reason": reason,
            "asked": time.time(),
        }
        write_json_atomically(self._private(key.run_id) / _PLAN, content, mode=0o600)

    def known(self, run_id: str) -> PendingPlan | None:
        """The plan that was asked for last under this run, approved or not; None where none was."""
        if run_id not in {folder.name for folder in self._runs()}:
            return None
        return _read(self._folder / run_id / _PLAN, _pending_plan)

    def approval(self, run_id: str) -> Approval | None:
        """What was approved for this run, None when nothing was."""
        found = _read(self._folder / run_id / _APPROVED, lambda values: Approval(**values))
        return found if found is not None and found.run == run_id else None

    def pending_plans(self) -> list[PendingPlan]:
        """Plans that wait for a person, the oldest first."""
        known = [plan for folder in self._runs() if (plan := self.known(folder.name)) is not None]
        return sorted((plan for plan in known if self._waits(plan)), key=lambda plan: plan.asked)

    def approve(
        self,
        plan: PendingPlan,
        *,
        rounds: int,
        epsilon: float | None,
        evaluations: int,
        evaluation_epsilon: float | None,
    ) -> Approval:
        """Approve exactly this plan, as the person has seen it, whatever was asked for meanwhile."""
        approval = Approval(
            run=plan.run,
            digest=plan.digest,
            rounds=rounds,
            epsilon=epsilon,
            evaluations=evaluations,
            evaluation_epsilon=evaluation_epsilon,
            by=_person(),
            at=time.time(),
        )
        write_json_atomically(self._private(plan.run) / _APPROVED, asdict(approval), mode=0o600)
        self._remember("plan approved", asdict(approval))
        return approval

    def revoke(self, run_id: str) -> bool:
        """Take an approval back; what was sent stays sent. False where there was none."""
        if run_id not in {folder.name for folder in self._runs()} or self.approval(run_id) is None:
            return False
        (self._folder / run_id / _APPROVED).unlink()
        self._remember("plan revoked", {"run": run_id, "by": _person(), "at": time.time()})
        return True

    def is_released(self, key: RoundKey, answer: SealedAnswer, *, purpose: str = TRAINING) -> bool:
        """Whether a person let exactly this answer leave."""
        path = self._folder / key.run_id / f"{_stem(key, purpose)}.{_RELEASED}"
        return _read(path, lambda values: str(values["digest"])) == answer.digest

    def ask_release(self, key: RoundKey, answer: SealedAnswer, *, purpose: str = TRAINING) -> None:
        """Write down that this answer waits."""
        epsilon = answer.metrics.get(EPSILON)
        waiting = PendingUpdate(
            run=key.run_id,
            attempt=key.attempt,
            round_number=key.round_number,
            model_hash=key.model_hash,
            purpose=purpose,
            digest=answer.digest,
            num_bytes=_num_bytes(answer),
            epsilon=None if epsilon is None else float(epsilon),
            asked=time.time(),
        )
        path = self._private(key.run_id) / f"{_stem(key, purpose)}.{_WAITING}"
        write_json_atomically(path, asdict(waiting), mode=0o600)

    def pending_updates(self) -> list[PendingUpdate]:
        """Answers that wait for a person, the oldest first."""
        waiting = [
            update
            for folder in self._runs()
            for path in sorted(folder.glob(f"*.{_WAITING}"))
            if (update := _read(path, lambda values: PendingUpdate(**values))) is not None
            and not path.with_name(path.name.replace(_WAITING, _RELEASED)).exists()
        ]
        return sorted(waiting, key=lambda update: update.asked)

    def release(self, run_id: str, round_number: int) -> PendingUpdate:
        """Let the newest answer that waits in this round leave. Raises ConfigError where none does."""
        waiting = [u for u in self.pending_updates() if (u.run, u.round_number) == (run_id, round_number)]
        if not waiting:
            raise ConfigError(
                f"no answer of run {run_id}, round {round_number} waits here",
                fix="flower-client approve lists what waits",
            )
        update = waiting[-1]
        path = self._private(run_id) / f"{_stem(update.key, update.purpose)}.{_RELEASED}"
        content = {"digest": update.digest, "by": _person(), "at": time.time()}
        write_json_atomically(path, content, mode=0o600)
        self._remember("update released", {**asdict(update), **content})
        return update

    def _waits(self, plan: PendingPlan) -> bool:
        approval = self.approval(plan.run)
        return approval is None or approval.digest != plan.digest or approval.at < plan.asked

    def _runs(self) -> Iterator[Path]:
        if self._folder.is_dir():
            yield from sorted(folder for folder in self._folder.iterdir() if folder.is_dir())

    def _private(self, run_id: str) -> Path:
        for folder in (self._folder, self._folder / run_id):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        return self._folder / run_id

    def _bound(self) -> None:
        """Forget the plan that has waited longest where too many wait; approved ones stay."""
        pending = [plan for plan in self.pending_plans() if self.approval(plan.run) is None]
        for plan in pending[: max(0, len(pending) - _MOST_RUNS + 1)]:
            (self._folder / plan.run / _PLAN).unlink(missing_ok=True)

    def _remember(self, what: str, content: dict[str, Any]) -> None:
        append_line(self._folder / HISTORY, json.dumps({"what": what, **content}), mode=0o600, durable=True)


def await_release(
    approvals: Approvals,
    key: RoundKey,
    answer: SealedAnswer,
    *,
    deadline: float,
    purpose: str = TRAINING,
    sleep: Callable[[float], None] = time.sleep,
) -> None:
    """Return once a person lets this sealed answer leave; nothing is locked meanwhile.

    Raises Refusal(APPROVAL) shortly before `deadline` (Unix seconds), in time for the server to hear it. The
    answer stays sealed, and is sent when the same question comes again and it was released.
    """
    if approvals.is_released(key, answer, purpose=purpose):
        return
    approvals.ask_release(key, answer, purpose=purpose)
    until = deadline - min(_TRAVEL_S, _TRAVEL_SHARE * max(0.0, deadline - time.time()))
    while time.time() < until:
        sleep(max(0.0, min(_POLL_S, until - time.time())))
        if approvals.is_released(key, answer, purpose=purpose):
            return
    number = key.round_number
    raise _not_approved(
        f"nobody let the answer of round {number} leave before its deadline",
        f"{approvals.command(key.run_id)} --round {number}; it goes when it is asked for again",
    )


def _not_approved(what: str, fix: str) -> Refusal:
    return Refusal(RefusalCode.APPROVAL, what, why="policy.approval asks for a person", fix=fix)


def _num_bytes(answer: SealedAnswer) -> int:
    return sum(array.nbytes for array in answer.delta.values()) + 8 * sum(map(len, answer.counts.values()))


def _stem(key: RoundKey, purpose: str) -> str:
    identity = f"{key.run_id}\n{key.attempt}\n{key.round_number}\n{key.model_hash}\n{purpose}"
    return f"round-{key.round_number:06d}-{hashlib.sha256(identity.encode()).hexdigest()[:32]}"


def _pending_plan(values: dict[str, Any]) -> PendingPlan:
    plan = parse(PublicPlan, values["plan"], source=_PLAN)
    return PendingPlan(**{**values, "plan": plan})


def _read(path: Path, make: Callable[[dict[str, Any]], R]) -> R | None:
    """What a file says; None where it is missing or is not as we write it."""
    try:
        return make(json.loads(path.read_text()))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, ConfigError):
        return None


def _person() -> str:
    """Who types, by the operating system and not by an environment variable."""
    try:
        return pwd.getpwuid(os.getuid()).pw_name
    except KeyError:
        return f"user {os.getuid()}"
