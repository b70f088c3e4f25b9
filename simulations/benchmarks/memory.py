"""Peak memory of a step, each way in a process of its own.

python -m simulations.benchmarks.memory dp cnn:28:128 --threads 2    prints {"bytes": ...} on Linux

Not `ru_maxrss`: it also remembers the imports, and the process that started this one. The kernel's high-water
mark can be set back once everything is ready.
"""

import argparse
import contextlib
import gc
import json
import re
import subprocess
import sys
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from simulations.benchmarks.cases import StepCase

_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")
WAYS = ("sgd", "dp")
_STEPS = 3
_TIMEOUT_S = 300.0


def measure_memory(case: StepCase, *, threads: int) -> dict[str, Any]:
    """Bytes by which a step raises the peak, ours and the twin's, and their ratio; null with a reason."""
    with ThreadPoolExecutor() as side_by_side:  # each counts its own memory, so they need not take turns
        answers = side_by_side.map(lambda way: _in_a_process(way, case, threads=threads), WAYS)
        found = dict(zip(WAYS, answers, strict=True))
    reasons = [answer["reason"] for answer in found.values() if answer.get("reason")]
    sizes = {way: answer.get("bytes") for way, answer in found.items()}
    sgd, dp = sizes["sgd"], sizes["dp"]
    ratio = dp / sgd if isinstance(sgd, int) and isinstance(dp, int) and sgd > 0 else None
    result: dict[str, Any] = {"memory_ratio": ratio, "bytes_sgd": sgd, "bytes_dp": dp}
    if ratio is None:
        result["memory_reason"] = reasons[0] if reasons else "the twin's step raised no peak"
    return result


def _in_a_process(way: str, case: StepCase, *, threads: int) -> dict[str, Any]:
    command = [sys.executable, "-m", __name__, way, case.text, "--threads", str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
        if done.returncode == 0:
            answer: dict[str, Any] = json.loads(done.stdout)
            return answer
    except (subprocess.TimeoutExpired, OSError, ValueError) as error:
        return {"reason": f"the measuring process failed ({type(error).__name__})"}
    return {"reason": f"the measuring process ended with {done.returncode}"}


def rise_of_peak(way: str, case: StepCase) -> dict[str, Any]:
    """Bytes between the memory just before the first whole step and the peak of three steps."""
    from simulations.benchmarks.dp_step import steps_of

    small = StepCase(model=case.model, image_size=case.image_size, batch_size=5, ragged=case.ragged)
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.simplefilter("ignore")
        # What is loaded once for ever (kernels, ciphers) is not the step's.
        with steps_of(small, (way,)) as rehearsal:
            rehearsal[way]()
        step = stack.enter_context(steps_of(case, (way,)))[way]
        gc.collect()
        try:
            _RESET.write_text("5")
            before = _kilobytes("VmRSS")
            for _ in range(_STEPS):
                step()
            return {"bytes": 1024 * (_kilobytes("VmHWM") - before)}
        except OSError as error:
            return {"reason": f"this system does not tell a process its peak ({error.strerror})"}


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
