"""Children end: when asked, when they do not listen, and when their parent is killed."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.child_process import ChildProcess

_DEAF = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\n"
    "print('deaf', flush=True); time.sleep(60)"
)


def _until(condition, patience_s=15.0):
    give_up_at = time.monotonic() + patience_s
    while not condition():
        assert time.monotonic() < give_up_at, "it took too long"
        time.sleep(0.02)


def _alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_output_goes_to_the_log_and_the_status_is_kept(tmp_path):
    child = ChildProcess([sys.executable, "-c", "print('word'); raise SystemExit(7)"], log=tmp_path / "a.log")
    assert child.poll() is None
    assert not child.is_running
    child.start()
    _until(lambda: child.poll() is not None)
    assert child.poll() == 7
    assert child.last_lines() == ["word"]
    assert (tmp_path / "a.log").stat().st_mode & 0o777 == 0o600


def test_one_that_ignores_the_polite_signal_is_killed(tmp_path):
    child = ChildProcess([sys.executable, "-c", _DEAF], log=tmp_path / "a.log")
    child.start()
    _until(lambda: child.last_lines() == ["deaf"])
    began = time.monotonic()
    child.stop(patience_s=0.3)
    assert time.monotonic() - began < 5
    assert child.poll() == -signal.SIGKILL
    child.stop()


def test_children_of_the_child_end_with_it(tmp_path):
    script = (
        "import subprocess, sys, time\n"
        "inner = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(60)'])\n"
        "print(inner.pid, flush=True); time.sleep(60)"
    )
    child = ChildProcess([sys.executable, "-c", script], log=tmp_path / "a.log")
    child.start()
    _until(lambda: child.last_lines())
    inner = int(child.last_lines()[0])
    child.stop(patience_s=5)
    _until(lambda: not _alive(inner))


def test_a_killed_parent_takes_its_children_along(tmp_path):
    script = (
        "import sys, time; from pathlib import Path; from common.child_process import ChildProcess\n"
        f"log = Path({str(tmp_path)!r}) / 'a.log'\n"
        "child = ChildProcess([sys.executable, '-c', 'import time; time.sleep(60)'], log=log)\n"
        "child.start(); print(child.pid, flush=True); time.sleep(60)"
    )
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    try:
        pid = int(parent.stdout.readline())
        assert _alive(pid)
        time.sleep(0.3)  # the child has asked the kernel by now
        os.kill(parent.pid, signal.SIGKILL)
        _until(lambda: not _alive(pid))
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()


def test_a_large_log_is_put_aside(tmp_path):
    log = tmp_path / "a.log"
    log.write_bytes(b"x" * (10 * 2**20 + 1))
    child = ChildProcess([sys.executable, "-c", "print('fresh')"], log=log)
    child.start()
    _until(lambda: child.poll() is not None)
    assert log.read_text() == "fresh\n"
    assert (tmp_path / "a.log.1").stat().st_size > 10 * 2**20


def test_it_is_started_once(tmp_path):
    child = ChildProcess([sys.executable, "-c", "import time; time.sleep(60)"], log=tmp_path / "a.log")
    with pytest.raises(ValueError, match="has not been started"):
        child.pid  # noqa: B018
    child.start()
    try:
        with pytest.raises(ValueError, match="runs already"):
            child.start()
    finally:
        child.kill()


def test_a_parent_killed_right_after_the_start_leaves_no_orphan(tmp_path):
    touched = tmp_path / "touched"
    script = (
        "import os, signal; from pathlib import Path; from common.child_process import ChildProcess\n"
        f"child = ChildProcess(['touch', {str(touched)!r}], log=Path({str(tmp_path)!r}) / 'a.log')\n"
        "child.start(); print(child.pid, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    )
    for _ in range(3):
        parent = subprocess.run([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, timeout=20)
        pid = int(parent.stdout)
        _until(lambda pid=pid: not _alive(pid))
    assert not touched.exists(), "it was run by nobody's child"


def test_a_group_is_signalled_once_after_its_leaders_end(tmp_path, monkeypatch):
    child = ChildProcess(["true"], log=tmp_path / "a.log")
    child.start()
    _until(lambda: child.poll() == 0)
    sent = []
    monkeypatch.setattr(os, "killpg", lambda pid, number: sent.append((pid, number)))
    for _ in range(2):
        child.stop()
    child.ask_to_end()
    assert sent == [(child.pid, signal.SIGTERM), (child.pid, signal.SIGKILL)]


def test_a_log_that_grows_while_the_child_writes_stays_bounded(tmp_path):
    script = (
        "import time\n"
        "print('x' * 11_000_000, flush=True)\n"
        "while True: print('later', flush=True); time.sleep(0.02)"
    )
    child = ChildProcess([sys.executable, "-c", script], log=tmp_path / "a.log")
    child.start()
    try:
        _until(lambda: child.log.stat().st_size > 11_000_000)
        child.bound_log()
        assert child.log.stat().st_size < 10_000
        kept = tmp_path / "a.log.1"
        assert kept.stat().st_size > 11_000_000
        assert kept.stat().st_mode & 0o777 == 0o600
        _until(lambda: child.last_lines(1) == ["later"])
        size = child.log.stat().st_size
        child.bound_log()
        assert child.log.stat().st_size >= size
    finally:
        child.stop()
