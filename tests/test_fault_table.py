"""docs/faults.md: every fault of the list has its row, and every test that a row names exists."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

from common.config import FederationConfig
from common.hospital_config import HospitalConfig

TESTS = Path(__file__).parent
TEXT = (TESTS.parent / "docs" / "faults.md").read_text()

FAULTS = (
    *("Server killed in a round, started again", "Server restarted without its database"),
    *("Hospital killed in a round", "Hospital restarted within 60 s of a crash"),
    *("Worker killed while the SuperNode lives", "Straggler", "Half of the hospitals leave", "Network cut"),
    *("Large model", "Disk full at the checkpoint", "Disk full in the database", "Corrupt checkpoint"),
    *("Duplicate, replayed or late update", "Clock skew", "Server certificate expired"),
    *("Server or proxy answers once with 500, 404, 413 or 429", "Wrong CA or wrong host name"),
    *("Unregistered key", "A connection without TLS", "Two clients with one key", "Different releases"),
    *("Different architecture", "Hospital with none or one patient", "One-class hospital"),
    *("Corrupt images in the folder", "Privacy budget spent in a run", "Ledger corrupt or tampered"),
    *("Crash between charge and training", "Two runs on one ledger", "Server stopped in a round"),
    *("NaN, Inf, wrong shape or type, an extra key, a huge header",),
    *("A server that asks for more than it may", "Patient identifiers in exception texts"),
    *("Control and Runtime paths from outside", "An older copy of the ledger is put back"),
    *("Nobody has approved the plan, or the update", "Differential privacy is not on"),
)
"""Thirty of the faults that Flower's behaviour gave us, in its order, and seven that go beyond."""


def rows() -> dict[str, tuple[str, str]]:
    """What happens and the tests, by fault."""
    found = {}
    for line in TEXT.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if line.startswith("| ") and len(cells) == 3 and cells[0] != "fault":
            assert cells[0] not in found, f"{cells[0]} is there twice"
            found[cells[0]] = (cells[1], cells[2])
    return found


@cache
def names_in(path: Path) -> frozenset[str]:
    tree = ast.parse(path.read_text())
    return frozenset(node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))


def test_every_fault_has_one_row():
    assert len(FAULTS) == 37
    assert set(rows()) == set(FAULTS)


@pytest.mark.parametrize("fault", FAULTS)
def test_every_test_that_shows_it_exists(fault):
    happens, shown = rows()[fault]
    assert happens.endswith(".")
    named = shown.split("<br>")
    assert named
    for cell in named:
        match = re.fullmatch(r"`([a-z0-9_/]+\.py)::(test_[a-z0-9_]+)`", cell)
        assert match, cell
        path = TESTS / match[1]
        assert path.exists(), f"{fault}: {match[1]}"
        assert match[2] in names_in(path), f"{fault}: {cell}"


def test_settings_that_it_names_exist():
    known = {
        f"{section}.{key}".replace("_", "-")
        for config in (FederationConfig, HospitalConfig)
        for section, field in config.model_fields.items()
        for key in field.annotation.model_fields
    }
    sections = {key.split(".")[0] for key in known}
    named = [f"{s}.{k}" for s, k in re.findall(r"`([a-z]+)\.([a-z0-9-]+)`", TEXT) if s in sections]
    assert named
    assert set(named) <= known
