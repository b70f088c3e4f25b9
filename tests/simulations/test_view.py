"""The live view: lines in a pipe, a table on a terminal, nothing when quiet, and cheap to keep up to date."""

import io
import json
import re
import time

import pytest
from rich.console import Console

from common.files import append_line, write_bytes_atomically, write_json_atomically
from common.settings import to_toml
from simulations import progress as progress_module
from simulations.progress import Progress, Tail
from simulations.view import follow, line, table
from tests.run_folders import HOSPITALS, build_config, build_evaluation, build_run, round_lines


def record(folder, lines):
    append_line(folder / "metrics.jsonl", "\n".join(json.dumps(line) for line in lines))


def started(folder, **federation):
    """A run folder before its first round."""
    build_run(folder, rounds=1)
    for name in ("metrics.jsonl", "result.json", "evaluation.json"):
        (folder / name).unlink()
    (folder / "config.toml").write_text(to_toml(build_config(**federation)))
    return folder


def plain_console():
    return Console(file=io.StringIO(), width=100)


def terminal_console():
    return Console(file=io.StringIO(), width=100, force_terminal=True, color_system=None)


def text_of(console):
    return console.file.getvalue()


def wait_for(condition):
    give_up_at = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < give_up_at
        time.sleep(0.02)


def test_pipe_gets_one_line_per_closed_round_as_it_closes(tmp_path):
    folder, console = started(tmp_path / "run"), plain_console()
    with follow(folder, total_rounds=6, console=console):
        record(folder, round_lines(1))
        wait_for(lambda: "round 1/6" in text_of(console))
        write_json_atomically(folder / "evaluation.json", build_evaluation(1))
        record(folder, round_lines(2, outcomes={"south": ("late", None)})[:-1])
        time.sleep(0.5)
        assert "round 2/6" not in text_of(console)
        record(folder, round_lines(2, outcomes={"south": ("late", None)})[-1:])
    assert text_of(console).splitlines() == [
        "round 1/6  3 of 3 hospitals  epsilon 1.20  1.00 s  left 5.00 s",
        "round 2/6  2 of 3 hospitals  test AUC .500 (round 1)  epsilon 1.62  1.00 s  left 8.00 s",
    ]


def test_quiet_shows_nothing_and_still_knows_everything(tmp_path):
    folder, console = started(tmp_path / "run"), plain_console()
    with follow(folder, total_rounds=6, console=console, quiet=True) as progress:
        record(folder, round_lines(1))
    assert text_of(console) == ""
    assert progress.rounds_done == 1


def test_terminal_gets_a_table_with_hospitals_as_rows(tmp_path):
    folder, console = started(tmp_path / "run"), terminal_console()
    with follow(folder, total_rounds=6, console=console):
        write_json_atomically(folder / "evaluation.json", build_evaluation(3))
        for number in (1, 2, 3):
            record(folder, round_lines(number, outcomes={"east": ("refused", "budget-spent")}))
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text_of(console)).split("round 3 of 6")[-1]
    assert re.search(r"north\s+100\s+trained in 3\s+1.74 of 3\s+0.40 s", shown)
    assert re.search(r"south\s+200\s+trained in 3\s+1.84 of 3\s+0.40 s", shown)
    assert re.search(r"east\s+300\s+refused \(budget-spent\)", shown)
    assert "test AUC .767  epsilon 1.84  2.00 s a round  left 6.00 s" in shown


def test_table_before_the_first_round_lists_who_is_awaited(tmp_path):
    progress, console = Progress(started(tmp_path / "run"), total_rounds=6), plain_console()
    assert progress.read() == []
    console.print(table(progress))
    assert text_of(console).count("waiting") == 3
    assert "round 0 of 6" in text_of(console)
    assert "left" not in text_of(console).replace("justify", "")


@pytest.mark.parametrize("federation", [{"private": False}, {"reproducible": True}])
def test_run_without_a_claim_shows_no_epsilon(tmp_path, federation):
    folder, console = started(tmp_path / "run", **federation), plain_console()
    progress = Progress(folder, total_rounds=6)
    progress.read()
    record(folder, round_lines(1, epsilon=False))
    (closed,) = progress.read()
    assert "not private" in line(progress, closed)
    assert "epsilon" not in line(progress, closed)
    console.print(table(progress))
    assert text_of(console).count("not private") >= 4


def test_resumed_run_tells_only_its_new_rounds(tmp_path):
    folder, console = started(tmp_path / "run"), plain_console()
    for number in (1, 2, 3):
        record(folder, round_lines(number))
    with follow(folder, total_rounds=6, console=console) as progress:
        wait_for(lambda: progress.rounds_done == 3)
        # The server drops a round that no checkpoint holds, then trains it again.
        kept = [entry for number in (1, 2) for entry in round_lines(number)]
        content = "".join(json.dumps(entry) + "\n" for entry in kept)
        write_bytes_atomically(folder / "metrics.jsonl", content.encode())
        wait_for(lambda: progress.rounds_done == 2)
        again = round_lines(3)
        again[-1]["closed"] += 60
        record(folder, again)
    assert [entry[:9] for entry in text_of(console).splitlines()] == ["round 3/6"]


def test_torn_and_foreign_lines_are_left_out(tmp_path):
    folder = started(tmp_path / "run")
    progress = Progress(folder, total_rounds=6)
    append_line(folder / "metrics.jsonl", "not json")
    append_line(folder / "metrics.jsonl", '["a list"]')
    whole = json.dumps(round_lines(1)[-1])
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(whole[:20])
        file.flush()
        assert progress.read() == []
        file.write(whole[20:] + "\n")
    assert [closed.round_number for closed in progress.read()] == [1]


def test_names_are_not_markup(tmp_path):
    folder, console = started(tmp_path / "run"), plain_console()
    progress = Progress(folder, total_rounds=2)
    record(folder, round_lines(1, ("[red]x[/red]",)))
    progress.read()
    console.print(table(progress))
    assert "[red]x[/red]" in text_of(console)


def test_run_may_break_while_it_is_watched(tmp_path):
    folder, console = started(tmp_path / "run"), plain_console()

    def broken_run():
        with follow(folder, total_rounds=6, console=console):
            record(folder, round_lines(1))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken_run()
    assert "round 1/6" in text_of(console)


def test_tail_reads_each_byte_once(tmp_path):
    path = tmp_path / "metrics.jsonl"
    tail = Tail(path)
    assert tail.read() == ([], False)
    append_line(path, "one")
    assert tail.read() == (["one"], False)
    assert tail.read() == ([], False)
    write_bytes_atomically(path, b"two\nthree\n")
    assert tail.read() == (["two", "three"], True)


def test_keeping_up_does_not_grow_with_the_run(tmp_path):
    folder = started(tmp_path / "run")
    progress = Progress(folder, total_rounds=100_000)
    names = [f"h{i}" for i in range(20)]
    for number in range(1, 500):
        record(folder, round_lines(number, names))
    progress.read()
    write_json_atomically(folder / "evaluation.json", build_evaluation(500))
    progress.read()
    began = time.perf_counter()
    for _ in range(100):
        assert progress.read() == []
    assert (time.perf_counter() - began) / 100 < 0.002
    assert progress.rounds_done == 499
    assert len(progress._sent) <= 12
    assert {row.name for row in progress.rows()} == {*names, *HOSPITALS}


def test_of_many_hospitals_the_table_shows_some_and_counts_all(tmp_path, monkeypatch):
    read = []
    known = progress_module.hospital_settings
    monkeypatch.setattr(
        progress_module, "hospital_settings", lambda folder, name: read.append(name) or known(folder, name)
    )
    names = [f"h{i:04d}" for i in range(1000)]
    folder = started(tmp_path / "run")
    write_json_atomically(folder / "hospitals" / "roster.json", {"hospitals": [*names, "late"]})
    record(folder, round_lines(1, names, outcomes={"h0007": ("refused", "budget-spent")}))
    progress = Progress(folder, total_rounds=2)
    progress.read()
    console = plain_console()
    console.print(table(progress))
    shown = text_of(console)
    assert "h0019" in shown
    assert "h0020" not in shown
    assert "and 981 more" in shown
    assert "999 trained in 1" in shown
    assert "1 waiting" in shown
    # Files of those who are not shown are not even read, nor those of the others twice.
    assert progress.rows(20)
    assert read == names[:20]
