import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, RecordDict

from simulations.engines.embedded import EmbeddedGrid, EngineError, open_grid
from simulations.engines.worker import ErrorCode

APP = "tests.simulations.toy_apps:client_app"
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def grid() -> Iterator[EmbeddedGrid]:
    with open_grid(
        {"toy.number": 7}, num_hospitals=3, num_workers=2, reproducible=True, client_app=APP
    ) as grid:
        yield grid


def requests(grid: EmbeddedGrid, *, ttl: float = 60.0, **fields: float) -> list[Message]:
    return [
        Message(RecordDict({"request": ConfigRecord(dict(fields))}), node_id, "train", ttl=ttl, group_id="1")
        for node_id in grid.get_node_ids()
    ]


def metrics(replies: Iterable[Message]) -> dict[int, dict]:
    records = [dict(reply.content["metrics"]) for reply in replies if reply.has_content()]
    return {record["partition"]: record for record in records}


def exists(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except OSError:
        return False


def test_every_hospital_answers_once_with_its_own_context(grid: EmbeddedGrid) -> None:
    messages = requests(grid)
    replies = list(grid.send_and_receive(messages, timeout=60))
    assert {reply.metadata.reply_to_message_id for reply in replies} == {
        message.metadata.message_id for message in messages
    }
    answers = metrics(replies)
    assert sorted(answers) == [0, 1, 2]
    assert all(answer["partitions"] == 3 and answer["configured"] == 7 for answer in answers.values())
    assert all(answer["threads"] == 1 and answer["deterministic"] == 1 for answer in answers.values())
    assert {answer["pid"] for answer in answers.values()} <= set(grid.pool.process_ids)


def test_pulling_never_waits_and_hands_each_reply_over_once(grid: EmbeddedGrid) -> None:
    message_ids = list(grid.push_messages(requests(grid, sleep=0.3)))
    started = time.monotonic()
    assert list(grid.pull_messages(message_ids)) == []
    assert time.monotonic() - started < 0.1
    deadline, replies = time.monotonic() + 30, []
    while len(replies) < 3 and time.monotonic() < deadline:
        replies += grid.pull_messages(message_ids)
        time.sleep(0.02)
    assert sorted(metrics(replies)) == [0, 1, 2]
    assert list(grid.pull_messages(message_ids)) == []


def test_an_exception_becomes_a_number_without_its_words(grid: EmbeddedGrid) -> None:
    replies = list(grid.send_and_receive(requests(grid, **{"fail-partition": 1}), timeout=60))
    errors = [reply.error for reply in replies if reply.has_error()]
    assert [error.code for error in errors] == [ErrorCode.CLIENT_APP_RAISED_EXCEPTION]
    assert not errors[0].reason
    assert sorted(metrics(replies)) == [0, 2]


def test_a_killed_worker_is_answered_for_and_replaced(grid: EmbeddedGrid) -> None:
    before = set(grid.pool.process_ids)
    replies = list(grid.send_and_receive(requests(grid, **{"kill-partition": 0}), timeout=60))
    assert [reply.error.code for reply in replies if reply.has_error()] == [ErrorCode.CLIENT_APP_CRASHED]
    again = list(grid.send_and_receive(requests(grid, sleep=0.3), timeout=60))
    assert sorted(metrics(again)) == [0, 1, 2]
    while len(after := set(grid.pool.process_ids)) < 2:
        time.sleep(0.05)
    assert after != before


def test_an_idle_worker_that_dies_costs_no_message(grid: EmbeddedGrid) -> None:
    os.kill(grid.pool.process_ids[0], signal.SIGKILL)
    time.sleep(0.2)
    assert sorted(metrics(grid.send_and_receive(requests(grid), timeout=60))) == [0, 1, 2]


def test_a_message_past_its_time_is_answered_as_unavailable(grid: EmbeddedGrid) -> None:
    started = time.monotonic()
    replies = list(grid.send_and_receive(requests(grid, ttl=0.5, sleep=1.2), timeout=60))
    assert time.monotonic() - started < 1.1
    assert {reply.error.code for reply in replies} == {ErrorCode.REPLY_MESSAGE_UNAVAILABLE}
    assert sorted(metrics(grid.send_and_receive(requests(grid), timeout=60))) == [0, 1, 2]


def test_an_unknown_hospital_is_unavailable(grid: EmbeddedGrid) -> None:
    stray = Message(RecordDict(), 5, "train")
    assert [reply.error.code for reply in grid.send_and_receive([stray], timeout=5)] == [
        ErrorCode.NODE_UNAVAILABLE
    ]


def test_bytes_are_those_that_crossed_the_pipe(grid: EmbeddedGrid) -> None:
    weights = ArrayRecord({"weight": Array(np.zeros((1000, 25), dtype=np.float32))})
    before = grid.run
    messages = requests(grid)
    for message in messages:
        message.content["arrays"] = weights
    list(grid.send_and_receive(messages, timeout=60))
    sent, received = grid.run.bytes_sent - before.bytes_sent, grid.run.bytes_recv - before.bytes_recv
    assert 3 * 100_000 < sent < 3 * 102_000
    assert 3 * 50 < received < 3 * 2_000


def test_messages_that_wait_are_not_copied_before_their_turn() -> None:
    weights = ArrayRecord({"weight": Array(np.zeros((1000, 25), dtype=np.float32))})
    with open_grid(
        {"toy.number": 7}, num_hospitals=200, num_workers=1, reproducible=False, client_app=APP
    ) as grid:
        messages = requests(grid, sleep=5.0)
        for message in messages:
            message.content["arrays"] = weights
        grid.push_messages(messages)
        deadline = time.monotonic() + 60
        while not grid.run.bytes_sent and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.2)
        assert 100_000 < grid.run.bytes_sent < 102_000


def test_workers_share_what_the_fork_server_has_imported(grid: EmbeddedGrid) -> None:
    answers = metrics(grid.send_and_receive(requests(grid), timeout=60))
    # Imported before the fork and frozen there; torch's compiler is not among it.
    assert all(answer["frozen"] > 100_000 and not answer["compiler"] for answer in answers.values())


def test_a_round_of_five_costs_little_beyond_the_work() -> None:
    with open_grid(
        {"toy.number": 7}, num_hospitals=5, num_workers=2, reproducible=False, client_app=APP
    ) as grid:
        list(grid.send_and_receive(requests(grid), timeout=60))
        started = time.monotonic()
        for _ in range(10):
            list(grid.send_and_receive(requests(grid), timeout=60))
        assert (time.monotonic() - started) / 10 < 0.5  # 0.1 on an idle machine; figures are for the bench


def test_workers_that_cannot_start_end_the_run_clearly() -> None:
    with open_grid(
        {},
        num_hospitals=2,
        num_workers=1,
        reproducible=False,
        client_app="tests.simulations.toy_apps:not_an_app",
    ) as grid:
        with pytest.raises(EngineError) as failure:
            list(grid.send_and_receive(requests(grid), timeout=60))
        assert len(str(failure.value).splitlines()) == 3


def test_closing_ends_all_workers() -> None:
    with open_grid(
        {"toy.number": 1}, num_hospitals=2, num_workers=2, reproducible=False, client_app=APP
    ) as grid:
        list(grid.send_and_receive(requests(grid, sleep=0.5), timeout=60))
        pids = grid.pool.process_ids
        assert len(pids) == 2
    assert not any(exists(pid) for pid in pids)


def test_no_worker_outlives_a_killed_command(tmp_path: Path) -> None:
    script = textwrap.dedent(
        f"""
        import sys
        from flwr.app import ConfigRecord, Message, RecordDict
        from simulations.engines.embedded import open_grid

        if __name__ == "__main__":
            grid = open_grid({{"toy.number": 1}}, num_hospitals=2, num_workers=2, reproducible=False,
                             client_app={APP!r})
            def ask(seconds):
                return [Message(RecordDict({{"request": ConfigRecord({{"sleep": seconds}})}}), node, "train")
                        for node in grid.get_node_ids()]
            list(grid.send_and_receive(ask(1.0)))
            grid.push_messages(ask(60.0))
            print(*grid.pool.process_ids, flush=True)
            list(grid.send_and_receive(ask(60.0)))
        """
    )
    path = tmp_path / "command.py"
    path.write_text(script)
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        [sys.executable, str(path)], stdout=subprocess.PIPE, text=True, cwd=ROOT, env=environment
    ) as command:
        assert command.stdout is not None
        pids = [int(pid) for pid in command.stdout.readline().split()]
        assert len(pids) == 2
        assert all(exists(pid) for pid in pids)
        time.sleep(0.5)
        command.kill()
        command.wait()
        deadline = time.monotonic() + 5
        while any(exists(pid) for pid in pids) and time.monotonic() < deadline:
            time.sleep(0.1)
        assert not any(exists(pid) for pid in pids)
