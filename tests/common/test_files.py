import json
import os
import resource
import stat
from contextlib import contextmanager

import pytest

from common.files import (
    append_line,
    manifest_problem,
    sha256_of_file,
    write_bytes_atomically,
    write_json_atomically,
    write_manifest,
)


@contextmanager
def small_files():
    """No file may grow beyond 100 bytes: a disk that fills up in the middle of a write.

    Not a fixture: the test runner writes its own output, often to a file, before a fixture ends.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_file_is_written_with_its_mode_and_missing_folders(tmp_path):
    path = tmp_path / "new" / "folder" / "file"
    write_bytes_atomically(path, b"content", mode=0o600)
    assert path.read_bytes() == b"content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    write_bytes_atomically(path, b"old")
    with small_files(), pytest.raises(OSError, match="File too large"):
        write_bytes_atomically(path, bytes(1000))
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_json_is_readable_and_finite(tmp_path):
    write_json_atomically(tmp_path / "x.json", {"name": "Zürich", "values": [1, None]})
    assert json.loads((tmp_path / "x.json").read_text()) == {"name": "Zürich", "values": [1, None]}
    assert "Zürich" in (tmp_path / "x.json").read_text()
    with pytest.raises(ValueError, match="Out of range"):
        write_json_atomically(tmp_path / "x.json", {"epsilon": float("inf")})
    assert json.loads((tmp_path / "x.json").read_text())["values"] == [1, None]


def test_lines_are_appended_whole(tmp_path):
    path = tmp_path / "folder" / "lines"
    append_line(path, "one", durable=True)
    append_line(path, "two")
    assert path.read_text() == "one\ntwo\n"


def test_a_line_that_does_not_fit_is_an_error_not_a_silent_half(tmp_path):
    path = tmp_path / "lines"
    append_line(path, "x" * 60)
    with small_files(), pytest.raises(OSError, match="in part"):
        append_line(path, "y" * 60)


def test_a_manifest_vouches_for_files_as_they_were(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).write_text(name * 10)
    assert manifest_problem(tmp_path) == "manifest.json is missing or unreadable"
    write_manifest(tmp_path, ["a", "b"])
    assert manifest_problem(tmp_path, required=["a", "b"]) is None
    assert manifest_problem(tmp_path, required=["c"]) == "c is not in the manifest"
    (tmp_path / "b").write_text("bbbbbbbbbB")
    assert manifest_problem(tmp_path) == "b does not match its hash"
    (tmp_path / "b").unlink()
    assert manifest_problem(tmp_path) == "b is missing"


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"files": []}', '{"files": {"a": 3}}', "null"])
def test_a_broken_manifest_vouches_for_nothing(tmp_path, text):
    (tmp_path / "a").write_text("a")
    (tmp_path / "manifest.json").write_text(text)
    assert manifest_problem(tmp_path, required=["a"]) is not None


def test_the_hash_is_that_of_sha256sum(tmp_path):
    (tmp_path / "abc").write_bytes(b"abc")
    expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert sha256_of_file(tmp_path / "abc") == expected


def test_the_folder_is_flushed_after_the_rename(tmp_path, monkeypatch):
    steps = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda *a: (steps.append("rename"), replace(*a)))
    monkeypatch.setattr(os, "fsync", lambda fd: (steps.append(stat.S_ISDIR(os.fstat(fd).st_mode)), fsync(fd)))
    write_bytes_atomically(tmp_path / "x", b"x")
    assert steps == [False, "rename", True]
