"""What the benchmark of the engines measures, and a run of two hundred hospitals."""

import os
import subprocess
import sys
import time

import numpy as np
import pytest

from common.errors import ConfigError
from simulations.benchmarks.engine import measure_scale
from simulations.benchmarks.watched_run import _MARK, WatchedRun, _Watch, generated_images


def test_generated_images_are_as_many_as_the_hospitals_need():
    with generated_images(7, images=20, test_images=30) as path, np.load(path) as content:
        assert content["train_images"].shape == (140, 28, 28)
        assert content["test_images"].shape == (30, 28, 28)
        assert set(content["train_labels"].tolist()) == {0, 1}
        # Equal pictures would be one unit.
        assert len(np.unique(content["train_images"].reshape(140, -1), axis=0)) == 140
    assert not path.exists()


def test_memory_is_that_of_all_processes_of_the_run_and_of_no_other():
    child = "x = b'x' * 40_000_000; input()"
    script = f"import subprocess, sys; {child.partition(';')[0]}\n"
    script += f"subprocess.run([sys.executable, '-c', {child!r}])"
    with _Watch("right", wanted=True) as watch, _Watch("wrong", wanted=True) as other:
        process = subprocess.Popen(
            [sys.executable, "-c", script], stdin=subprocess.PIPE, env={**os.environ, _MARK: "right"}
        )
        give_up_at = time.monotonic() + 30
        while watch.peak_bytes < 80_000_000 and time.monotonic() < give_up_at:
            time.sleep(0.1)
        process.communicate(b"\n")
    assert 80_000_000 < watch.peak_bytes < 160_000_000
    assert watch.processes == 2
    assert other.peak_bytes == 0


def test_time_per_hospital_and_round_leaves_out_start_and_end():
    run = WatchedRun(
        result={},
        wall_s=60.0,
        first_training_s=5.0,
        first_sent_s=4.0,
        closed_s=(14.0, 24.0),
        hospital_rounds=200,
        peak_bytes=None,
        processes=None,
    )
    assert run.seconds_per_hospital_round == pytest.approx(0.1)


def test_a_comparison_of_sizes_needs_two():
    with pytest.raises(ConfigError, match="needs two"):
        measure_scale(hospitals=(5, 5))


@pytest.mark.faults
@pytest.mark.timeout(1500)
def test_two_hundred_hospitals_cost_each_what_fifty_do_and_no_memory_more():
    scale = measure_scale(hospitals=(50, 200))
    few, many = scale["raw"]["50"], scale["raw"]["200"]
    assert (few["updates"], many["updates"]) == (100, 400)
    # A wide bound for busy machines; docs/benchmarks.md has what a quiet one measures.
    assert scale["ratio_per_hospital_round"] < 1.6
    assert many["bytes_peak"] < 3e9
    assert many["bytes_peak"] < few["bytes_peak"] + 300e6
