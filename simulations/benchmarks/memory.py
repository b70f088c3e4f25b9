"""Peak memory of a step, each way in a process of its own.

python -m simulations.benchmarks.memory dp cnn:28:128 --threads 2    prints {"bytes": ...} on Linux

Not `ru_maxrss`: it also remembers the imports, and the process that started this one. The kernel's high-water
mark can be set back once everything is ready.
"""

import argparse
import contextlib
import ctypes
import gc
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

from simulations.benchmarks.cases import StepCase

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_STEPS = 3
_TIMEOUT_S = 300.0


def free_bytes() -> int | None:
    """Memory that can be had without swapping; None where the system does not tell."""
    try:
        found = re.search(r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), flags=re.MULTILINE)
    except OSError:
        return None
    return 1024 * int(found.group(1)) if found else None


def rises_of_peak(case: StepCase, names: Sequence[str], *, threads: int) -> dict[str, dict[str, Any]]:
    """`rise_of_peak` of each named way, each in a process of its own."""
    with ThreadPoolExecutor(2) as side_by_side:  # each counts its own memory, so they need not take turns
        answers = side_by_side.map(lambda name: _in_a_process(name, case, threads=threads), names)
        return dict(zip(names, answers, strict=True))


def _in_a_process(way: str, case: StepCase, *, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, way, case.text, "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode == 0:
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {"reason": f"the measuring process failed ({type(error).__name__})"}
    last = (done.stderr.strip().splitlines() or ["without a word"])[-1][:200]
    return {"reason": f"the measuring process ended with {done.returncode}: {last}"}


def rise_of_peak(way: str, case: StepCase) -> dict[str, Any]:
    """Bytes between the memory just before the first whole step and the peak of three steps, or a reason."""
    from simulations.benchmarks.training_steps import ways_of

    small = replace(case, batch_size=5)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        # What is loaded once for ever (kernels, ciphers) is not the step's.
        with ways_of(small, (way,)) as rehearsal:
            rehearsal[way].step()
        step = stack.enter_context(ways_of(case, (way,)))[way].step
        gc.collect()
        _give_back_what_is_free()
        try:
            _RESET.write_text("5")
            before = _kilobytes("VmRSS")
            for _ in range(_STEPS):
                step()
            return {"bytes": 1024 * (_kilobytes("VmHWM") - before)}
        except OSError as error:
            return {"reason": f"this system does not tell a process its peak ({error.strerror})"}


def _give_back_what_is_free() -> None:
    """Let the C library return freed memory, which would hide as much of the step's; glibc only."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _kilobytes(field: str) -> int:
    found = re.search(rf"^{field}:\s+(\d+) kB", _STATUS.read_text(), flags=re.MULTILINE)
    if found is None:
        raise OSError(0, f"no {field} in {_STATUS}")
    return int(found.group(1))


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure one way in this process and print what was found."""
    parser = argparse.ArgumentParser(description="Peak memory of a training step.")
    parser.add_argument("way")
    parser.add_argument("case", type=StepCase.parse)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    import torch

    torch.set_num_threads(options.threads)
    print(json.dumps(rise_of_peak(options.way, options.case)))


if __name__ == "__main__":
    main()
