"""Torch's compiler stays away until it is wanted, and is the real one then."""

import subprocess
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = """
import sys
from simulations.engines import lazy_compiler
lazy_compiler.install()
import torch

def step():
    model = torch.nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model(torch.ones(4, 3)).sum().backward()
    before = model.weight.detach().clone()
    optimizer.step()
    optimizer.zero_grad()
    assert torch.allclose(before - model.weight, torch.full((2, 3), 0.4))

step()
torch.set_deterministic_debug_mode("error")
assert torch.are_deterministic_algorithms_enabled()
assert "torch._dynamo.eval_frame" not in sys.modules
torch.set_deterministic_debug_mode(0)

import torch._dynamo
assert torch._dynamo.config.cache_size_limit > 0
assert "torch._dynamo.eval_frame" in sys.modules
assert sys.modules["torch._dynamo"].__spec__ is not None
assert torch._dynamo is sys.modules["torch._dynamo"]
step()
lazy_compiler.install()
assert torch._dynamo.eval_frame
"""


def test_an_optimiser_needs_no_compiler_and_who_wants_it_gets_it():
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(SCRIPT)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
