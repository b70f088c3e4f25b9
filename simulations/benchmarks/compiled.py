"""Whether torch.compile works here for a twin, tried in a process of its own so that it can be cut short.

python -m simulations.benchmarks.compiled sgd-compiled cnn:28:128 --threads 2

What the trial has compiled lies in torch's cache on disk: the measuring process does not wait for it again.
"""

import argparse
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence

from simulations.benchmarks.cases import StepCase

_TIMEOUT_S = 180.0
_STEPS = 2


def why_not_compiled(case: StepCase, *, threads: int, timeout_s: float = _TIMEOUT_S) -> dict[str, str | None]:
    """Name of each compiled twin, and why it cannot be had, or None where it can."""
    from simulations.benchmarks.training_steps import COMPILED_TWINS

    return {way: _why_not(way, case, threads=threads, timeout_s=timeout_s) for way in COMPILED_TWINS}


def _why_not(way: str, case: StepCase, *, threads: int, timeout_s: float) -> str | None:
    command = [sys.executable, "-m", __name__, way, case.text, "--threads", str(threads)]
    trial = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    try:
        _, errors = trial.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(trial.pid, signal.SIGKILL)  # the compilers that it has started too
        trial.communicate()
        return f"not compiled within {timeout_s:.0f} s"
    if trial.returncode == 0:
        return None
    return f"compilation failed: {errors.strip().splitlines()[-1][:200] if errors.strip() else 'no reason'}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Compile one twin and take a few steps with it."""
    parser = argparse.ArgumentParser(description="Try to compile a training step.")
    parser.add_argument("way")
    parser.add_argument("case", type=StepCase.parse)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    import torch

    from simulations.benchmarks.training_steps import ways_of

    torch.set_num_threads(options.threads)
    with ways_of(options.case, (options.way,)) as ways:
        for _ in range(_STEPS):
            ways[options.way].step()


if __name__ == "__main__":
    main()
