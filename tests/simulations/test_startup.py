"""The benchmark of a start measures what it says; how long anything takes is for the benchmark to say."""

import json

import pytest

from simulations.benchmarks.startup import PROGRAMS, help_commands, measure_startup


@pytest.fixture(scope="module")
def content():
    return measure_startup(repeats=1, programs=(), patients=12, image_size=32)


def test_the_content_is_json_and_has_its_raw_seconds(content):
    assert json.loads(json.dumps(content, allow_nan=False)) == content
    assert set(content) == {"commands", "seconds_slowest_command", "decode", "solver", "raw"}
    decode, raw = content["decode"], content["raw"]["decode"]
    assert decode["seconds_first"] == raw["first"][0] > 0
    assert decode["ratio_second_to_loop"] == pytest.approx(raw["second"][0] / raw["loop"][0])
    assert decode["images"] >= 12
    assert decode["bytes_mapped"] > decode["images"] * 64 * 64


def test_the_noise_is_the_one_that_is_known(content):
    assert [case["noise_multiplier"] for case in content["solver"]["cases"]] == [2.477, 4.645, 1.15]
    assert all(case["cpu_seconds"] > 0 for case in content["solver"]["cases"])


def test_every_command_is_found():
    names = {program: [" ".join(arguments) for arguments in help_commands(program)] for program in PROGRAMS}
    assert {"--help", "status --help", "start --help"} <= set(names["flower-server"])
    assert {"code accept --help", "ledger verify --help"} <= set(names["flower-client"])
    assert "run --help" in names["flower-simulate"]
