"""The measurement of the server's memory: what it counts, and what the played hospitals send."""

import os
import subprocess
import sys
import time

import pytest

from simulations.benchmarks import process_memory
from simulations.benchmarks.played_update import mark
from simulations.benchmarks.process_memory import Memory, family, pss_of
from simulations.benchmarks.server_memory import some_shapes

PARENT = (
    "import subprocess, sys, time; block = bytearray(30_000_000); "
    "subprocess.Popen([sys.executable, '-c', 'import time; block = bytearray(50_000_000); time.sleep(60)']); "
    "time.sleep(60)"
)


def test_a_family_is_counted_with_all_its_members():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], start_new_session=True)
    try:
        give_up_at = time.monotonic() + 20
        while sum(pss_of(family(parent.pid)).values()) < 80e6:
            assert time.monotonic() < give_up_at
            time.sleep(0.05)
        assert len(family(parent.pid)) == 2
        assert 80e6 < sum(pss_of(family(parent.pid)).values()) < 130e6
    finally:
        os.killpg(parent.pid, 9)
        parent.wait()
    assert pss_of({parent.pid: "supervisor"}) == {}


def test_the_peak_is_that_of_the_sum():
    memory = Memory(root=1)
    memory.samples = [(0.0, {"a": 5, "b": 1}), (1.0, {"a": 4, "b": 4}), (2.0, {"b": 6})]
    assert memory.peak == {"a": 4, "b": 4}
    assert memory.each_peak == {"a": 5, "b": 6}


@pytest.mark.parametrize("parameters", [1000, 2_000_000, 25_000_000])
def test_shapes_add_up_and_one_array_is_large(parameters):
    sizes = [size for (size,) in some_shapes(parameters).values()]
    assert sum(sizes) == parameters
    assert max(sizes) == int(0.6 * parameters)


@pytest.mark.parametrize(
    ("command", "kind"),
    [
        (b"python\0-m\0server.deployment.superlink_process\0--port\x001", "superlink"),
        (b"python\0-m\0server.deployment.front_process", "front"),
        (b"python\0-m\0server.deployment.server_process\0/x/superlink", "server process"),
        (b"python\0-m\0server.cli\0start", "supervisor"),
    ],
)
def test_processes_are_told_by_their_command(command, kind):
    assert process_memory._kind(command) == kind


def test_each_hospital_has_bytes_of_its_own_however_they_are_cut():
    whole = bytearray(1_000_000)
    mark(whole, 0, number=300)
    assert {whole[place] for place in range(len(whole))} == {0, 300 % 128, 300 // 128}
    for size in (300_000, 2**18, 999_999):
        pieces = [bytearray(1_000_000)[start : start + size] for start in range(0, 1_000_000, size)]
        for number, piece in enumerate(pieces):
            mark(piece, number * size, number=300)
        assert b"".join(pieces) == whole
