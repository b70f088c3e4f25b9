"""Small federations at an operator, and hospitals' keys, for tests."""

import subprocess
import sys
from pathlib import Path

from common.flower_programs import free_ports
from common.node_keys import load_public_key, make_key
from server.provisioning.new_federation import make_federation, plan_federation

ROOT = Path(__file__).resolve().parents[3]


def flower_server(*arguments, cwd=ROOT, timeout=60):
    """Call the command as a person does."""
    command = [sys.executable, "-c", "from server.cli import main; main()", *map(str, arguments)]
    return subprocess.run(
        command,
        cwd=cwd,
        env=None,
        capture_output=True,
        text=True,
        check=False,
        timeout=timeout,
    )


def hospital_key(folder, name):
    """Make a hospital's key; give the path of its public half."""
    public = folder / f"{name}.key.pub"
    make_key(folder / f"{name}.key", public, comment=name)
    return public


def public_key(folder, name):
    return load_public_key(hospital_key(folder, name))


def small_federation(path, *overrides):
    """A federation whose ports nobody uses now."""
    listen, superlink, health = free_ports(3)
    network = {"address": "fl.example.org:8443", "listen": f"127.0.0.1:{listen}"}
    network |= {"superlink-port": superlink, "health-port": health}
    return make_federation(
        path, plan_federation({"federation": {"name": "chest"}, "network": network}, overrides)
    )
