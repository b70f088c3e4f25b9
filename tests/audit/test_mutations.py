"""The audit of the audits: every known bug, put back into production, turns at least one check red.

For each mutant the check that is meant for it comes first, then all others, those from outside before those
from inside, until one is red. What was found is compared with the table in docs/audit.md.
"""

import sys
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest

from tests.audit.hospital_checks import without_self_test
from tests.audit.mutants import all_mutants
from tests.audit.mutation_checks import CHECKS

pytestmark = pytest.mark.audit

ROOT = Path(__file__).resolve().parents[2]
GUIDE = ROOT / "docs" / "audit.md"
MUTANTS = all_mutants()
BEGIN, END = "<!-- mutants: compared with the test run -->", "<!-- end of mutants -->"


WATCHED: list[list[str]] = []
PACKAGES = tuple(f"{ROOT / name}/" for name in ("common", "client", "server", "simulations"))


def note_reading(event, arguments):
    """An audit hook of Python's: sources of ours that are opened, but for imports."""
    if WATCHED and event == "open" and str(arguments[0]).endswith(".py"):
        by_import = "importlib" in sys._getframe(1).f_code.co_filename
        if str(arguments[0]).startswith(PACKAGES) and not by_import:
            WATCHED[-1].append(str(arguments[0]))


@pytest.fixture(scope="session")
def source_reading():
    """Gives the list of source files that are read inside; a process that a check starts only imports."""
    sys.addaudithook(note_reading)  # stays until the process ends

    @contextmanager
    def watching():
        WATCHED.append([])
        try:
            yield WATCHED[-1]
        finally:
            WATCHED.pop()

    with watching() as read:
        Path(PACKAGES[0], "__init__.py").read_text()
    assert read, "the hook sees what is read"
    return watching


def run_check(name, mutant):
    """What a check finds with a mutant in; None where it could not be carried out, which counts for nothing.

    The start-up self-test would keep a hospital from training at all: it is a check of its own.
    """
    with pytest.MonkeyPatch.context() as patch:
        if mutant:
            MUTANTS[mutant].put_in(patch)
        without_self_test(patch)
        try:
            return CHECKS[name](mutant)
        except Exception:
            if not mutant:
                raise
            return None


@cache
def caught(mutant):
    """The first check that is red and what it found; (None, None) when all are green."""
    for name in sorted(CHECKS, key=lambda name: name != MUTANTS[mutant].caught_by):
        finding = run_check(name, mutant)
        if finding is not None and not finding.passed:
            return name, finding
    return None, None


@pytest.mark.parametrize("name", CHECKS)
def test_without_a_mutant_every_check_is_green_and_none_reads_source_text(name, source_reading):
    with source_reading() as read:
        finding = run_check(name, "")
    assert finding.passed, finding.said
    assert not read


@pytest.mark.parametrize("mutant", MUTANTS)
def test_every_mutant_is_caught(mutant, record_property):
    check, finding = caught(mutant)
    assert check is not None, MUTANTS[mutant].says
    record_property("caught by", f"{check}: {finding.said}")


def test_every_trap_has_a_mutant():
    traps = {mutant.trap for mutant in MUTANTS.values()}
    assert traps == {f"T{number}" for number in range(1, 13)} | {"amplification", "handling"}
    assert len(MUTANTS) >= 25
    assert all(mutant.caught_by in CHECKS for mutant in MUTANTS.values())


@pytest.mark.timeout(900)
def test_at_least_half_of_the_mutants_are_caught_from_outside():
    outside = [mutant for mutant in MUTANTS if caught(mutant)[1] and caught(mutant)[1].black_box]
    assert 2 * len(outside) >= len(MUTANTS)


# --- the table for people ---


def table():
    """The lines of docs/audit.md between the marks, as this run would write them."""
    lines = [
        "| bug that is put back | trap | what it does | first red check | from outside |",
        "|---|---|---|---|---|",
    ]
    for mutant in sorted(MUTANTS.values(), key=lambda m: (order_of(m.trap), m.name)):
        check, finding = caught(mutant.name)
        outside = "yes" if finding and finding.black_box else "no"
        lines.append(f"| {mutant.name} | {mutant.trap} | {mutant.says} | {check} | {outside} |")
    return "\n".join(lines)


def order_of(trap):
    return (0, int(trap[1:])) if trap[0] == "T" else (1, trap)


@pytest.mark.timeout(900)
def test_the_table_of_mutants_is_this_runs():
    text = GUIDE.read_text()
    stands = text.partition(BEGIN)[2].partition(END)[0].strip()
    assert stands == table(), f"write into {GUIDE.name}:\n{table()}"
