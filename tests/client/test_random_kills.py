"""200 times SIGKILL at a random moment of a round: one answer per question, and none without a charge."""

import json
import multiprocessing
import os
import random
import signal
import time
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path

import pytest

from client.ledger.ledger import Ledger
from common.privacy.accountant import running_epsilon
from common.privacy.plan import PrivacyEvent
from tests.client.small_hospital import make_hospital, make_plan

KILLS = 200
ROUNDS_AT_ONCE = 3
_SEED = 20_261


def nursery(connection, toml: str) -> None:
    """Warm and without a torch operation of its own; forks a hospital for every number that it is sent.

    Each child asks for that round and writes what left to a file of its own: one line, in one write.
    """
    import torch._dynamo  # noqa: F401 - what torch's optimisers import when the first one is made

    import client.app  # noqa: F401
    import client.round
    from tests.client import small_hospital as hospital

    # The self-test has tests of its own; here it would be most of the round that is to be cut.
    client.round.require_self_test = lambda *_, **__: None
    hospital.TaskIdentity.run_id = hospital.TaskIdentity.task_id = hospital.TaskIdentity.node_id = 1
    plan = make_plan(federation={"rounds": 1000})
    requests, left = {}, Path(toml).parent / "left"
    left.mkdir()
    weights = hospital.weights_of(plan)
    event = PrivacyEvent(sampling_rate=0.5, noise_multiplier=2.0, steps=2)
    while (number := connection.recv()) is not None:
        # The accountant remembers what it has computed: a child asks for this round's cost and has it.
        running_epsilon([replace(event, steps=2 * number)], delta=1 / (10 * hospital.ENROLLED))
        request = requests.setdefault(number, hospital.training_request(plan, weights, round_number=number))
        pid = os.fork()
        if pid == 0:
            answer_and_leave(hospital, Path(toml), request, number, left)
        connection.send(pid)


def answer_and_leave(hospital, toml, request, number, left):
    import hashlib

    import torch

    try:
        torch.set_num_threads(1)
        content = hospital.ask(toml, request)
        said = repr(sorted((name, sorted(r.items())) for name, r in hospital.everything_in(content).items()))
        refusal = hospital.messages.refusal_code(content)
        line = {"round": number, "sha256": hashlib.sha256(said.encode()).hexdigest(), "refusal": refusal}
        file = os.open(left / f"{os.getpid()}", os.O_WRONLY | os.O_CREAT)
        os.write(file, json.dumps(line).encode())
    finally:
        os._exit(0)


class Forks:
    """Children of the nursery, which are not ours to wait for: their end is when their pid is gone."""

    def __init__(self, toml: Path) -> None:
        context = multiprocessing.get_context("spawn")
        self._ours, theirs = context.Pipe()
        self._process = context.Process(target=nursery, args=(theirs, str(toml)), daemon=True)
        self._process.start()
        self.left = toml.parent / "left"

    def start(self, number: int) -> int:
        self._ours.send(number)
        return self._ours.recv()

    def ended(self, pid: int) -> bool:
        try:
            return "Z" in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
        except OSError:
            return True

    def await_end(self, pid: int) -> float:
        begun = time.monotonic()
        while not self.ended(pid):
            assert time.monotonic() - begun < 60
            time.sleep(0.002)
        return time.monotonic() - begun

    def kill(self, pid: int) -> bool:
        """SIGKILL it; whether it was still at work."""
        alive = not self.ended(pid)
        os.kill(pid, signal.SIGKILL)
        self.await_end(pid)
        return alive

    def answer(self, pid: int) -> dict | None:
        """What left it, None where it was killed before."""
        file = self.left / str(pid)
        text = file.read_text() if file.exists() else ""
        return json.loads(text) if text else None

    def close(self) -> None:
        self._ours.send(None)
        self._process.join(10)
        self._process.kill()


@pytest.mark.faults
@pytest.mark.timeout(900)
def test_200_random_kills_leave_one_answer_per_round_and_a_charge_for_each(tmp_path):
    toml = make_hospital(tmp_path / "north", epsilon=1e6)
    draw, forks = random.Random(_SEED), Forks(toml)
    answers, kills, number = defaultdict(set), Counter(), 0
    try:
        lasts_s = sorted(forks.await_end(forks.start(n)) for n in range(1, 4))[1]
        while sum(kills.values()) < KILLS:
            number += 1
            while True:  # asked again until it is answered, and killed each time
                pid = forks.start(number)
                time.sleep(draw.uniform(0, 1.2 * lasts_s))
                kills[number] += forks.kill(pid)
                if (answer := forks.answer(pid)) is not None:
                    assert answer["refusal"] is None
                    answers[number].add(answer["sha256"])
                    break
        for asked in range(1, number + 1):  # and once more, all that was ever asked
            pid = forks.start(asked)
            forks.await_end(pid)
            answer = forks.answer(pid)
            # An answer is kept for four rounds; later the question is refused, never answered anew.
            if asked > number - 4:
                assert answer["refusal"] is None
                answers[asked].add(answer["sha256"])
            else:
                assert answer["refusal"] == "round-already-answered-for-other-weights"
    finally:
        forks.close()
    assert {asked: len(different) for asked, different in answers.items()} == dict.fromkeys(answers, 1)
    ledger = Ledger.open(toml.parent / "ledger")
    charges = ledger.charges()
    assert [charge.key.round_number for charge in charges] == list(range(1, number + 1))
    assert sum(charge.sealed_sha256 is not None for charge in charges) == number
    assert ledger.verify() == []
    # It was cut in every part: before and after the charge, and more than once in the same round.
    assert sum(kills.values()) >= KILLS
    assert max(kills.values()) > 1
    print(f"{number} rounds of {lasts_s:.2f} s, {sum(kills.values())} kills")
