"""Backup and restore: a round trip, also while the database is written; nothing foreign is unpacked."""

import io
import json
import sqlite3
import stat
import tarfile
from contextlib import closing

import pytest

from common.errors import ConfigError
from server.provisioning.backup import restore_backup, write_backup
from server.provisioning.checks import check_operator
from server.provisioning.enrolments import enrol_hospital
from tests.run_folders import build_run
from tests.server.provisioning.federations import public_key, small_federation


@pytest.fixture
def folder(tmp_path):
    folder = small_federation(tmp_path / "op")
    enrol_hospital(folder, name="north", key=public_key(tmp_path, "north"), enrolled_patients=400)
    run = build_run(folder.runs / "run-0001")
    (run / "checkpoints" / "3").mkdir(parents=True)
    (run / "checkpoints" / "3" / "model.safetensors").write_bytes(b"weights")
    (run / "spool").mkdir()
    (run / "spool" / "reply").write_bytes(b"reply")
    (run / "checkpoints" / ".4.123.tmp").mkdir()
    (run / "checkpoints" / ".4.123.tmp" / "half").write_bytes(b"half")
    folder.remember_run(run)
    (folder.receipts / "north.receipt").write_bytes(b"sealed by north")
    return folder


def contents(folder):
    return {
        str(path.relative_to(folder.path)): path.read_bytes()
        for path in folder.path.rglob("*")
        if path.is_file() and path != folder.database
    }


def test_round_trip_keeps_every_file_and_tightens_the_modes(folder, tmp_path):
    archive = tmp_path / "federation.tar.gz"
    number = write_backup(folder, archive)
    assert stat.S_IMODE(archive.stat().st_mode) == 0o600
    back = restore_backup(archive, tmp_path / "back")
    before, after = contents(folder), contents(back)
    dropped = {name for name in before if "spool" in name or ".tmp" in name or name.endswith(".lock")}
    assert after == {name: content for name, content in before.items() if name not in dropped}
    assert len(after) == number
    assert after["receipts/north.receipt"] == b"sealed by north"
    for path in back.path.rglob("*"):
        assert stat.S_IMODE(path.stat().st_mode) & 0o077 == 0
    assert back.run_folder() == tmp_path / "back" / "runs" / "run-0001"
    failed = [check for check in check_operator(back) if check.state == "failed"]
    assert [check.name for check in failed] == ["roster"]  # one hospital, quorum two: as it was


def test_the_database_is_one_moment_while_it_is_written(folder, tmp_path):
    with closing(sqlite3.connect(folder.database)) as writer:
        writer.execute("PRAGMA journal_mode = WAL")
        writer.execute("CREATE TABLE node (name TEXT)")
        writer.executemany("INSERT INTO node VALUES (?)", [("a",), ("b",)])
        writer.commit()
        writer.execute("INSERT INTO node VALUES ('not yet')")
        write_backup(folder, tmp_path / "b.tar.gz")
        writer.rollback()
    back = restore_backup(tmp_path / "b.tar.gz", tmp_path / "back")
    with closing(sqlite3.connect(back.database)) as database:
        assert database.execute("SELECT name FROM node").fetchall() == [("a",), ("b",)]
    assert stat.S_IMODE(back.database.stat().st_mode) == 0o600


def test_nothing_is_written_over(folder, tmp_path):
    archive = tmp_path / "b.tar.gz"
    write_backup(folder, archive)
    before = archive.read_bytes()
    with pytest.raises(ConfigError, match="exists already"):
        write_backup(folder, archive)
    assert archive.read_bytes() == before
    with pytest.raises(ConfigError, match="is not empty"):
        restore_backup(archive, folder.path)
    assert not list(tmp_path.glob(".*.tmp"))


def archive_with(path, name, content, *, schema=1, kind=tarfile.REGTYPE):
    with tarfile.open(path, "w:gz") as tar:
        label = json.dumps({"schema": schema}).encode()
        for member, data, how in (("backup.json", label, tarfile.REGTYPE), (name, content, kind)):
            info = tarfile.TarInfo(member)
            info.size, info.type, info.linkname = len(data), how, "/etc/passwd"
            tar.addfile(info, io.BytesIO(data))
    return path


@pytest.mark.parametrize(
    "name", ["../escaped", "/tmp/escaped", "ca/../../escaped", "bin/program", "state/other", "ca"]
)
def test_foreign_names_are_refused_and_nothing_stays(tmp_path, name):
    archive = archive_with(tmp_path / "b.tar.gz", name, b"x")
    with pytest.raises(ConfigError, match="cannot be restored"):
        restore_backup(archive, tmp_path / "back")
    assert not (tmp_path / "back").exists()
    assert not (tmp_path / "escaped").exists()


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_links_and_devices_are_refused(tmp_path, kind):
    archive = archive_with(tmp_path / "b.tar.gz", "roster.json", b"", kind=kind)
    with pytest.raises(ConfigError, match="which no backup has"):
        restore_backup(archive, tmp_path / "back")


def test_what_is_no_backup_is_refused(folder, tmp_path):
    with pytest.raises(ConfigError, match="its schema is 2"):
        restore_backup(archive_with(tmp_path / "new.tar.gz", "roster.json", b"", schema=2), tmp_path / "x")
    with pytest.raises(ConfigError, match="there is no file"):
        restore_backup(tmp_path / "nothing", tmp_path / "x")
    (tmp_path / "text").write_text("hello")
    with pytest.raises(ConfigError, match="cannot be restored"):
        restore_backup(tmp_path / "text", tmp_path / "x")
    write_backup(folder, tmp_path / "b.tar.gz")
    whole = (tmp_path / "b.tar.gz").read_bytes()
    (tmp_path / "torn").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ConfigError, match="cannot be restored"):
        restore_backup(tmp_path / "torn", tmp_path / "x")
    assert not (tmp_path / "x").exists()
