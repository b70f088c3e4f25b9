"""Black-box checks of a whole hospital: what it answers to a server that cheats, dies or asks again."""

import os
import shutil
import signal
import tempfile
from pathlib import Path

import client.round
from client.ledger.records import Charge
from client.site import _site as site_of
from common import messages
from common.errors import RefusalCode
from simulations.audits.accounting import recomputed_epsilon
from simulations.audits.finding import Finding
from simulations.audits.hospital_at_work import become_a_task
from simulations.engines.processes import start_process, stop_process
from tests.client.small_hospital import (
    ENROLLED,
    ask,
    charges,
    everything_in,
    make_hospital,
    make_plan,
    training_request,
)

SIGMA = 2.0


def found(name, wrong, right, **numbers):
    """Red when anything is wrong."""
    return Finding(
        audit=name,
        passed=not wrong,
        said="; ".join(wrong) if wrong else right,
        numbers=numbers,
        black_box=True,
    )


def answer(toml, request):
    """Content of the answer and whether it is an update."""
    content = ask(toml, request)
    return content, messages.REFUSAL not in content


def check_asked_twice():
    """One round key, one update."""
    become_a_task()
    with tempfile.TemporaryDirectory() as folder:
        toml = make_hospital(Path(folder) / "north")
        answers = [answer(toml, training_request()) for _ in range(2)]
        paid = len(charges(toml))
    assert all(trained for _, trained in answers), "the hospital of this check does not train"
    different = len({str(everything_in(content)[messages.ARRAYS]) for content, _ in answers})
    wrong = [f"{different} different updates for {paid} charge"] if different > paid else []
    return found("asked twice", wrong, "a round that is asked for twice has one update", updates=different)


def train_and_die(connection, toml, mutant):
    """In a process of its own, with the bug in it: killed when training ends."""
    import pytest

    from tests.audit.mutants import all_mutants

    patch = pytest.MonkeyPatch()
    if mutant:
        all_mutants()[mutant].put_in(patch)
    without_self_test(patch)
    real = client.round.train_privately

    def killed(**arguments):
        real(**arguments)
        connection.send_bytes(b"trained")
        os.kill(os.getpid(), signal.SIGKILL)

    patch.setattr(client.round, "train_privately", killed)
    become_a_task()
    ask(Path(toml), training_request())


def without_self_test(patch):
    """Let a hospital train in spite of its start-up self-test, which is a check of its own here."""
    patch.setattr(client.round, "require_self_test", lambda *_, **__: None)


def check_killed_round(mutant):
    """Killed with trained weights in its memory, the hospital has already paid."""
    become_a_task()
    with tempfile.TemporaryDirectory() as folder:
        toml = make_hospital(Path(folder) / "north")
        process, connection = start_process(train_and_die, (str(toml), mutant), name="hospital")
        try:
            assert connection.recv_bytes() == b"trained"
            process.join(30)
            assert process.exitcode == -signal.SIGKILL
        finally:
            stop_process(process, connection)
        paid = len(charges(toml))
    wrong = [] if paid == 1 else ["patients were trained on and the ledger knows nothing of it"]
    return found("killed round", wrong, "a round that is killed after training stands in the ledger")


def check_several_runs():
    """Runs of two federations on the same patients cost what they cost together."""
    become_a_task()
    plan, rounds = make_plan(), 3
    rate, steps = plan.privacy.sampling_rate, plan.privacy.local_steps
    delta = 1 / (10 * ENROLLED)

    def cost(trained):
        return recomputed_epsilon(
            sampling_rate=rate, noise_multiplier=SIGMA, steps=trained * steps, delta=delta
        )

    budget = 1.02 * cost(rounds)
    with tempfile.TemporaryDirectory() as folder:
        toml = make_hospital(Path(folder) / "north", noise_multiplier=SIGMA, epsilon=budget)
        trained = sum(
            answer(toml, training_request(plan, run_id=run, round_number=number))[1]
            for run in ("one", "two")
            for number in range(1, rounds + 1)
        )
    assert trained >= rounds, "the hospital of this check does not train"
    spent = cost(trained)
    wrong = [] if spent <= budget else [f"{trained} rounds cost {spent:.3g} of a budget of {budget:.3g}"]
    return found("several runs", wrong, f"two runs stay within one budget of {budget:.3g}", spent=spent)


def check_older_ledger():
    """A copy of the ledger from before a round is put back; the server shows that round's receipt."""
    become_a_task()
    with tempfile.TemporaryDirectory() as folder:
        toml = make_hospital(Path(folder) / "north")
        for number in (1, 2):
            content, trained = answer(toml, training_request(round_number=number))
            assert trained, "the hospital of this check does not train"
            if number == 1:
                shutil.copytree(toml.parent / "ledger", Path(folder) / "copy")
        receipt = messages.receipt_of(content)
        shutil.rmtree(toml.parent / "ledger")
        shutil.copytree(Path(folder) / "copy", toml.parent / "ledger")
        site_of.cache_clear()
        request = training_request(round_number=3)
        request.content.update(messages.receipt_record(receipt))
        content, trained = answer(toml, request)
        assert trained or messages.refusal_code(content) is RefusalCode.LEDGER
    wrong = ["a charge was forgotten and the hospital trains on"] if trained else []
    return found("older ledger", wrong, "on an older copy of the ledger nothing is trained")


def check_greedy_server():
    """A server asks for less noise than the policy adds, and for more of everything than it allows."""
    become_a_task()
    wishes = {
        "less noise": {"minimum-noise-multiplier": 0.9},
        "a wild clip": {"l2-clip-norm": 1e9},
        "wild steps": {"local-steps": 900},
    }
    wrong = []
    with tempfile.TemporaryDirectory() as folder:
        for number, (wish, privacy) in enumerate(wishes.items()):
            toml = make_hospital(
                Path(folder) / str(number), noise_multiplier=SIGMA, epsilon=200.0, maximum_local_steps=100
            )
            content, trained = answer(toml, training_request(make_plan(privacy=privacy)))
            used = [charge.event.noise_multiplier for charge in charges(toml)]
            if wish == "less noise":
                assert trained, "the hospital of this check does not train"
                stated = float(content[messages.METRICS][messages.NOISE_MULTIPLIER])
                wrong += [f"noise {stated:g} below the policy's {SIGMA:g}"] * (min(stated, *used) < SIGMA)
            else:
                wrong += [f"{wish}: not refused"] * (trained or bool(used))
                assert trained or messages.refusal_code(content) is RefusalCode.POLICY
    return found("greedy server", wrong, "a server can ask for more privacy and never for less")


def unwritten_charge(key, *, purpose, event, delta):
    """A charge that stands in no ledger."""
    return Charge(
        number=0,
        key=key,
        purpose=purpose,
        event=event,
        claims_privacy=True,
        epsilon=0.0,
        delta=delta,
        l2_clip_norm=None,
        unit="patient",
        cohort_digest="",
        recipient="",
        plan_digest="",
        time="",
        hash="",
        sealed_sha256=None,
    )
