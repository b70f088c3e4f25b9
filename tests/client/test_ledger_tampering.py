"""Whoever changes, shortens or replaces the ledger is noticed; nothing starts again from zero."""

import json
import random
import shutil
import sqlite3
from contextlib import closing

import pytest
from typer.testing import CliRunner

from client.ledger.ledger import Ledger
from client.ledger.store import row_hash, rows_of
from client.ledger_commands import ledger_app
from common.errors import LedgerError, RefusalCode
from common.messages import RoundKey
from common.privacy.plan import PrivacyEvent

DELTA = 1e-4


@pytest.fixture
def folder(tmp_path):
    folder = tmp_path / "ledger"
    ledger = Ledger.open(folder)
    cohort = ledger.cohort(f"patient-{number}" for number in range(40))
    for number in range(1, 5):
        key = RoundKey(run_id="study", attempt=1, round_number=number, model_hash=f"m{number}")
        event = PrivacyEvent(sampling_rate=1, noise_multiplier=12.0, steps=2)
        ledger.charge(key, event=event, cohort=cohort, delta=DELTA)
        ledger.mark_sealed(key, f"{number}" * 64)
    return folder


def edit(folder, *statements):
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        for name in ("charges_stay", "charges_remain", "seals_stay", "seals_remain"):
            connection.execute(f"DROP TRIGGER {name}")
        for statement in statements:
            connection.execute(statement)
        connection.commit()


def refused(folder):
    with pytest.raises(LedgerError) as caught:
        Ledger.open(folder)
    assert caught.value.refusal is RefusalCode.LEDGER
    assert caught.value.why
    assert caught.value.fix
    return str(caught.value)


def test_the_tables_are_append_only(folder):
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        for statement in ("UPDATE charges SET steps = 0", "DELETE FROM charges", "DELETE FROM seals"):
            with pytest.raises(sqlite3.IntegrityError, match="append only"):
                connection.execute(statement)


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE charges SET noise_multiplier = 60.0 WHERE number = 2",
        "UPDATE charges SET steps = 1 WHERE number = 4",
        "UPDATE charges SET claims_privacy = 0 WHERE number = 1",
        "UPDATE charges SET epsilon = 0.001 WHERE number = 3",
        "UPDATE charges SET time = '2020-01-01' WHERE number = 3",
        "UPDATE seals SET sha256 = 'other' WHERE number = 2",
        "DELETE FROM seals WHERE number = 4",
        "DELETE FROM charges WHERE number = 2",
        "DELETE FROM charges WHERE number = 4",
        "UPDATE cohorts SET members = substr(members, 1, 32), size = 1",
        "UPDATE meta SET value = '[3, \"x\"]' WHERE name = 'charges'",
        "UPDATE meta SET value = 'rubbish' WHERE name = 'charges'",
    ],
)
def test_an_edit_is_refused_and_found(folder, statement):
    edit(folder, statement)
    refused(folder)
    result = CliRunner().invoke(ledger_app, ["verify", str(folder), "--format", "json"])
    assert result.exit_code in (1, 2)
    assert json.loads(result.output)["ok"] is False


def test_a_shortened_ledger_with_repaired_head_in_the_database_is_refused(folder):
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        third = rows_of(connection, "charges")[2]["hash"]
    edit(
        folder,
        "DELETE FROM seals WHERE charge = 4",
        "DELETE FROM charges WHERE number = 4",
        f"UPDATE meta SET value = '[3, \"{third}\"]' WHERE name = 'charges'",
    )
    assert "missing" in refused(folder) or "removed" in refused(folder)


def test_an_older_database_under_the_newer_head_is_refused(folder, tmp_path):
    shutil.copy(folder / "ledger.sqlite", tmp_path / "older")
    ledger = Ledger.open(folder)
    key = RoundKey(run_id="study", attempt=1, round_number=9, model_hash="m9")
    ledger.charge(key, event=None, cohort=ledger.cohort(["x"]), delta=DELTA)
    shutil.copy(tmp_path / "older", folder / "ledger.sqlite")
    assert "missing" in refused(folder)
    with pytest.raises(LedgerError):
        ledger.charge(key, event=None, cohort=ledger.cohort(["x"]), delta=DELTA)


def test_any_flipped_byte_of_the_database_is_refused(folder):
    good = (folder / "ledger.sqlite").read_bytes()
    chooser = random.Random(5)
    places = [0, 20, 25, len(good) - 1, *(chooser.randrange(len(good)) for _ in range(60))]
    for place in places:
        bad = bytearray(good)
        bad[place] ^= 1 << chooser.randrange(8)
        (folder / "ledger.sqlite").write_bytes(bad)
        with pytest.raises(LedgerError):
            Ledger.open(folder)
    (folder / "ledger.sqlite").write_bytes(good)
    assert Ledger.open(folder).verify() == []


@pytest.mark.parametrize("name", ["site.key", "head.json"])
def test_a_flipped_byte_beside_the_database_is_refused(folder, name):
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    refused(folder)


@pytest.mark.parametrize("name", ["site.key", "head.json", "ledger.sqlite"])
def test_a_missing_file_is_never_a_fresh_start(folder, name):
    (folder / name).unlink()
    refused(folder)
    assert not (folder / name).exists()


@pytest.mark.parametrize("content", [b"", b"not a database" * 400])
def test_something_else_in_place_of_the_database_is_refused(folder, content):
    (folder / "ledger.sqlite").write_bytes(content)
    refused(folder)
    result = CliRunner().invoke(ledger_app, ["verify", str(folder)])
    assert result.exit_code == 2


def rechain(folder, *, change):
    """Edit like somebody who knows the format: new hashes, new heads, nothing left but the mathematics."""
    with closing(sqlite3.connect(folder / "ledger.sqlite")) as connection:
        rows = rows_of(connection, "charges")
    previous = "0" * 64
    statements = []
    for row in rows:
        change(row)
        row["previous_hash"] = previous
        row["hash"] = previous = row_hash(row)
        columns = ", ".join(f"{name} = {value!r}" for name, value in row.items() if value is not None)
        statements.append(f"UPDATE charges SET {columns} WHERE number = {row['number']}")
    head = json.dumps([len(rows), previous])
    statements.append(f"UPDATE meta SET value = '{head}' WHERE name = 'charges'")
    edit(folder, *statements)
    store = Ledger.examine(folder)._store
    with store.examining() as connection:
        store._write_head(connection)


def test_an_understated_epsilon_is_found_by_recomputing(folder):
    rechain(folder, change=lambda row: row.update(epsilon=row["epsilon"] * 0.99))
    findings = Ledger.open(folder).verify()
    assert [finding.charge for finding in findings] == [1, 2, 3, 4]
    assert {finding.kind for finding in findings} == {"epsilon"}
    assert "understates" in findings[0].message


def test_a_weakened_event_does_not_fit_its_stored_epsilon(folder):
    def weaken(row):
        row["noise_multiplier"] = 18.0 if row["number"] == 4 else row["noise_multiplier"]

    rechain(folder, change=weaken)
    findings = Ledger.open(folder).verify()
    assert [finding.charge for finding in findings] == [4]
    assert "does not belong" in findings[0].message


def test_two_answers_to_one_round_are_found(folder):
    def repeat(row):
        row["round_number"] = min(row["round_number"], 3)

    rechain(folder, change=repeat)
    findings = Ledger.open(folder).verify()
    assert [finding.kind for finding in findings] == ["duplicate"]
    assert "2 models" in findings[0].message


def test_verify_agrees_in_words_and_json(folder):
    result = CliRunner().invoke(ledger_app, ["verify", str(folder)])
    assert result.exit_code == 0, result.output
    assert "4 charge(s)" in result.output
    result = CliRunner().invoke(ledger_app, ["verify", str(folder), "--format", "json"])
    assert json.loads(result.output) == {"ok": True, "charges": 4, "findings": []}


def test_verify_recomputes_sampled_steps_of_several_runs(folder):
    ledger = Ledger.open(folder)
    event = PrivacyEvent(sampling_rate=0.3, noise_multiplier=4.0, steps=5)
    for number, members in enumerate((["patient-1", "x"], ["x", "y"]), start=1):
        key = RoundKey(run_id="other", attempt=1, round_number=number, model_hash="m")
        ledger.charge(key, event=event, cohort=ledger.cohort(members), delta=DELTA)
    assert ledger.verify() == []


def test_verify_tells_findings_in_words(folder):
    edit(folder, "UPDATE charges SET steps = 1 WHERE number = 4")
    result = CliRunner().invoke(ledger_app, ["verify", str(folder)])
    assert result.exit_code == 1
    assert "line 4 was altered" in result.output


def test_show_and_verify_by_the_hospitals_file(folder):
    (folder.parent / "hospital.toml").write_text(
        '[hospital]\nname = "north"\nenrolled-patients = 1000\n[data]\npath = "x.npz"\n'
        f'[site]\nledger = "{folder.name}"\n'
    )
    for where in (folder.parent / "hospital.toml", folder.parent, folder):
        result = CliRunner().invoke(ledger_app, ["show", str(where), "--format", "json"])
        assert result.exit_code == 0, result.output
        shown = json.loads(result.output)
        assert shown["delta"] == pytest.approx(1e-4)
        assert shown["private"] is True
        assert shown["runs"][0]["run_id"] == "study"
    result = CliRunner().invoke(ledger_app, ["show", str(folder)])
    assert "worst-off patient has spent epsilon" in result.output
    assert "study: epsilon" in result.output


@pytest.mark.parametrize("command", ["show", "verify"])
def test_an_absent_ledger_is_unusable_and_is_not_made(tmp_path, command):
    for where in (tmp_path, tmp_path / "nowhere.toml"):
        result = CliRunner().invoke(ledger_app, [command, str(where)])
        assert result.exit_code == 2
        result = CliRunner().invoke(ledger_app, [command, str(where), "--format", "json"])
        assert result.exit_code == 2
        assert json.loads(result.output)["error"]["what"]
    assert list(tmp_path.iterdir()) == []
