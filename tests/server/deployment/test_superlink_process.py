"""What is changed of Flower's SuperLink, in a process of its own."""

import subprocess
import sys

LOOK = """
import gc, time
from flwr.supercore import sql_mixin
{before}
from server.deployment.superlink_process import spare_memory
spare_memory()
print(dict(sql_mixin.SQLITE_PRAGMAS))
class Ring: pass
ring = Ring(); ring.ring = ring; ring.content = bytearray(10**6)
import weakref
gone = weakref.ref(ring); del ring
give_up_at = time.monotonic() + 10
while gone() is not None and time.monotonic() < give_up_at: time.sleep(0.05)
print("gone" if gone() is None else "there")
"""


def look(before=""):
    return subprocess.run(
        [sys.executable, "-c", LOOK.format(before=before)], capture_output=True, text=True, timeout=120
    )


def test_the_database_has_little_memory_and_answered_requests_are_forgotten():
    said = look().stdout
    assert "'cache_size': '-1000'" in said
    assert "'mmap_size': '0'" in said
    assert "'journal_mode': 'WAL'" in said
    assert said.rstrip().endswith("gone")


def test_a_flower_without_these_settings_is_an_error():
    done = look("del sql_mixin.SQLITE_PRAGMAS")
    assert done.returncode != 0
    assert "RuntimeError" in done.stderr
