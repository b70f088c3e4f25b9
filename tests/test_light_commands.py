"""`--help` and `status` answer at once: they import nothing that takes long (bench measures the seconds)."""

import json
import subprocess
import sys

import pytest

from server.provisioning.enrolments import enrol_hospital
from simulations.benchmarks.startup import PROGRAMS, help_commands
from tests.server.provisioning.federations import public_key, small_federation

HEAVY = {"torch", "torchvision", "opacus", "dp_accounting", "scipy", "sklearn", "matplotlib", "PIL", "flwr"}
HEAVY |= {"numpy", "httpx", "starlette", "uvicorn", "ray", "safetensors", "pydicom", "nibabel", "imagecodecs"}
HELP = HEAVY | {"rich", "grpc", "cryptography"}
"""What even the help of a command has no use for."""

_RUN = """
import contextlib, importlib, io, json, sys

module, commands = sys.argv[1], json.loads(sys.argv[2])
application = importlib.import_module(module)
for command in commands:
    sys.argv = [module, *command]
    with contextlib.redirect_stdout(io.StringIO()), contextlib.suppress(SystemExit):
        application.main()
print(json.dumps(sorted({name.partition(".")[0] for name in sys.modules})))
"""


def imported(module, *commands):
    """Top-level packages that one process has imported after these commands."""
    run = [sys.executable, "-c", _RUN, module, json.dumps([[str(word) for word in c] for c in commands])]
    return set(json.loads(subprocess.run(run, check=True, capture_output=True, timeout=240).stdout))


@pytest.mark.parametrize("program", PROGRAMS)
def test_help_of_every_command_imports_nothing_heavy(program):
    asked = list(help_commands(program))
    assert len(asked) > 5
    assert imported(PROGRAMS[program], *asked) & HELP == set()


def test_status_of_a_federation_imports_nothing_heavy(tmp_path):
    folder = small_federation(tmp_path / "op")
    enrol_hospital(folder, name="north", key=public_key(tmp_path, "north"), enrolled_patients=400)
    used = imported("server.cli", ["status", "--dir", folder.path])
    assert "rich" in used  # it did print the roster
    assert used & (HEAVY | {"grpc"}) == set()


def test_status_of_a_hospital_imports_nothing_heavy(tmp_path):
    (tmp_path / "hospital.toml").write_text(
        f'[hospital]\nname = "north"\nenrolled-patients = 100\n[data]\npath = "{tmp_path}"\n'
    )
    used = imported("client.cli", ["status", tmp_path])
    assert "rich" in used
    assert used & (HEAVY | {"grpc", "cryptography"}) == set()
