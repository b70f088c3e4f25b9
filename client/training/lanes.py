"""Work side by side: as many lanes as torch has threads, each with one torch thread of its own.

Chunks are small, and their many small operations do not share well between threads that wait for each other;
whole chunks beside each other do. A lane computes on a copy of the network that shares the weights and has
gradients of its own. Which chunk is computed in which lane follows from its number, so that sums are formed
in one order, and a lane computes with one thread always, so that no bit depends on the lane.
"""

import copy
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from functools import cache
from threading import Barrier
from typing import Any

import torch
from torch import nn

Work = Callable[[], Any]


def lanes_for(device: torch.device) -> int:
    """How many lanes are worth while: torch's threads; one on an accelerator."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def side_by_side(work: Sequence[Work], *, lanes: int) -> list[Any]:
    """Results of all `work`, number i done in lane i modulo `lanes`, each lane in order.

    With one lane everything runs in this thread. Raises what the first that failed raised, after all lanes
    have ended.
    """
    if lanes <= 1 or not work:
        return [one() for one in work]

    def run(lane: int) -> list[Any]:
        return [one() for one in work[lane::lanes]]

    pool = _pool(os.getpid(), lanes)
    running = [pool.submit(run, lane) for lane in range(min(lanes, len(work)))]
    wait(running)
    found = [lane.result() for lane in running]
    return [found[number % lanes][number // lanes] for number in range(len(work))]


def copy_beside(model: nn.Module) -> nn.Module:
    """A copy of `model` with the same weights and buffers in memory, and gradients of its own."""
    shared: dict[int, Any] = {id(buffer): buffer for buffer in model.buffers()}
    for parameter in model.parameters():
        shared[id(parameter)] = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    return copy.deepcopy(model, shared)


@cache
def _pool(process: int, lanes: int) -> ThreadPoolExecutor:
    """The lanes of a process: a fork has none of its parent's threads."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(lanes, thread_name_prefix="lane", initializer=_one_thread)
    ready = Barrier(lanes)
    wait([pool.submit(ready.wait) for _ in range(lanes)])
    torch.set_num_threads(threads)  # the number for threads that are still to come is that of the last caller
    return pool


def _one_thread() -> None:
    torch.get_num_threads()  # otherwise the first operation here would take over the number of the process
    torch.set_num_threads(1)
