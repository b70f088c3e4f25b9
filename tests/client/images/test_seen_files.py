"""Files that stayed as they were are not read again; whatever changed is."""

import json
import os
import stat

import pytest

from client.images import seen_files
from client.images.decode import Unusable, content_digest
from client.images.records import SkipReason
from client.images.seen_files import FILE, SeenFiles

LIMIT = 1000


@pytest.fixture
def reads(monkeypatch):
    """Files that were read, in order."""
    paths, honest = [], seen_files.read_content

    def counting(path, **limits):
        paths.append(os.path.basename(path))
        return honest(path, **limits)

    monkeypatch.setattr(seen_files, "read_content", counting)
    return paths


@pytest.fixture
def start(tmp_path, monkeypatch, reads):
    """One start of the hospital, some seconds after everything was written; the files that were read."""
    (tmp_path / "data").mkdir()
    (tmp_path / "cache").mkdir()
    for name in "abc":
        (tmp_path / "data" / name).write_bytes(name.encode() * 9)

    def run(*, later_s=5, max_pixels=LIMIT, cache=True):
        reads.clear()
        now = seen_files.time.time_ns()
        with monkeypatch.context() as patch:
            patch.setattr(seen_files.time, "time_ns", lambda: now + later_s * 10**9)
            seen = SeenFiles(tmp_path / "cache" if cache else None, max_pixels=max_pixels)
            found = {p.name: seen.digest(str(p)) for p in sorted((tmp_path / "data").iterdir())}
            seen.keep()
        assert found == {p.name: content_digest(p.read_bytes()) for p in (tmp_path / "data").iterdir()}
        return list(reads)

    return run


def test_a_second_start_reads_nothing(start, tmp_path):
    assert start() == ["a", "b", "c"]
    assert start() == []
    file = tmp_path / "cache" / FILE
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert start(max_pixels=LIMIT + 1) == ["a", "b", "c"]  # what is too large depends on it


def test_without_a_cache_folder_everything_is_read(start):
    assert start(cache=False) == start(cache=False) == ["a", "b", "c"]


def test_only_what_changed_is_read_whatever_its_times_and_size_say(start, tmp_path):
    start()
    data = tmp_path / "data"
    before = (data / "a").stat()
    (data / "a").write_bytes(b"x" * 9)
    os.utime(data / "a", ns=(before.st_atime_ns, before.st_mtime_ns))
    (data / "new").write_bytes(b"b" * 9)
    os.replace(data / "new", data / "b")
    assert start() == ["a", "b"]
    assert start() == []


def test_what_was_written_a_moment_ago_is_read_again(start):
    assert start(later_s=0) == ["a", "b", "c"]
    assert start() == ["a", "b", "c"]
    assert start() == []


def test_files_that_are_gone_are_forgotten_and_new_ones_join(start, tmp_path):
    start()
    (tmp_path / "data" / "a").unlink()
    (tmp_path / "data" / "d").write_bytes(b"d")
    assert start() == ["d"]
    assert len(json.loads((tmp_path / "cache" / FILE).read_text())["files"]) == 3


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b'{"schema": 1}', b'{"schema": 1, "max_pixels": 1000, "files": [[1, "x"]]}']
)
def test_a_damaged_file_is_no_file(start, tmp_path, content):
    start()
    (tmp_path / "cache" / FILE).write_bytes(content)
    assert start() == ["a", "b", "c"]
    assert start() == []


def test_links_and_pipes_are_never_taken_for_known(tmp_path):
    (tmp_path / "file").write_bytes(b"x")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    os.mkfifo(tmp_path / "pipe")
    seen = SeenFiles(None, max_pixels=LIMIT)
    for name, reason in (
        ("link", SkipReason.UNREADABLE),
        ("pipe", SkipReason.UNREADABLE),
        ("no", SkipReason.MISSING),
    ):
        with pytest.raises(Unusable) as caught:
            seen.digest(str(tmp_path / name))
        assert caught.value.reason is reason


def test_what_could_not_be_used_is_forgotten(start, tmp_path):
    start()
    SeenFiles(tmp_path / "cache", max_pixels=LIMIT).forget()
    assert start() == ["a", "b", "c"]
