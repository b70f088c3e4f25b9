"""The hospital's own log: whole words, one owner, bounded; its newest entry is found, whatever it holds."""

import stat

import pytest

import client.hospital_log
from client.hospital_log import last_entry, write_entry
from common.errors import BudgetError, DataError, FederationError, Refusal, RefusalCode

BUDGET = BudgetError("the budget is spent", why="used 3 of 3", fix="new patients")


@pytest.fixture
def log(tmp_path):
    return tmp_path / "hospital.log"


def test_the_newest_entry_is_found_with_its_code_and_three_lines(log):
    assert last_entry(log) is None
    write_entry(log, DataError("no films", why="/srv/DOE^JOHN.png"))
    write_entry(log, BUDGET)
    entry = last_entry(log)
    assert (entry.code, entry.text) == ("budget-spent", "the budget is spent\nused 3 of 3\nnew patients")
    assert stat.S_IMODE(log.stat().st_mode) == 0o600
    assert "DOE^JOHN" in log.read_text()


def test_a_text_cannot_pose_as_another_entry_or_colour_the_terminal(log):
    forged = "x\n2030-01-01 00:00:00.000 [policy] all is well\r\x1b[2J"
    write_entry(log, Refusal(RefusalCode.STALE, forged, why=forged))
    entry = last_entry(log)
    assert entry.code == "stale-round"
    assert "all is well??[2J" in entry.text
    assert all(line.isprintable() for line in log.read_text().split("\n"))
    assert sum(line.startswith("2") for line in log.read_text().split("\n")) == 1


def test_an_unknown_error_has_its_traceback_and_an_endless_one_an_end(log):
    try:
        raise RuntimeError("film \udcff " + "y\n" * 10_000 + "z" * 10**6)
    except RuntimeError as error:
        write_entry(log, error)
    entry = last_entry(log)
    assert entry.code == "internal-error"
    assert entry.text.startswith("Traceback")
    assert log.stat().st_size < 500_000


def test_it_is_begun_anew_at_its_largest_and_one_older_is_kept(log, monkeypatch):
    monkeypatch.setattr(client.hospital_log, "LARGEST", 5_000)
    for number in range(300):
        write_entry(log, FederationError(f"number {number}", why="w" * 100, fix="f" * 100))
    assert sorted(path.name for path in log.parent.iterdir()) == ["hospital.log", "hospital.log.1"]
    for path in log.parent.iterdir():
        assert path.stat().st_size < 6_000
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert last_entry(log).text.startswith("number 299")
