"""The Ray engine: Flower's own simulation engine, driven by Flower's own commands.

A SuperLink in simulation mode is started on loopback with a home of its own inside the run folder, `flwr run`
submits the installed apps with this run's settings, and both are gone afterwards. Telemetry, update checks
and installing packages at run time are off.
"""

import contextlib
import importlib.util
import json
import os
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

import tomli_w

from common.child_process import ChildProcess
from common.config import FederationConfig
from common.errors import ConfigError, FederationError
from common.flower_programs import ROOT, flower_environment, free_port, program
from common.settings import Scalar, to_flat

PACKAGES = ("common", "server", "client")
LOG, RESULT = "ray.log", "result.json"
_START_TIMEOUT_S = 90.0
_ASK_EVERY_S = 20.0
_CONNECTION = "here"


def run_on_ray(config: FederationConfig, *, num_hospitals: int) -> None:
    """Run both apps under `flwr run` until the run has ended. Raises FederationError with the log's place."""
    if importlib.util.find_spec("ray") is None:
        raise ConfigError(
            "--engine ray needs Ray, which is not installed",
            fix="pip install 'hospital-federation[ray]', or use --engine embedded",
        )
    folder = Path(config.runtime.run_folder)
    home = folder / "flower"
    shutil.rmtree(home, ignore_errors=True)
    try:
        app = write_app(home / "app", to_flat(config))
        port = free_port()
        write_connection(home, port)
        with superlink(home, port, folder / LOG) as server, (folder / LOG).open("ab") as log:
            run_id = _submit(app, home, log, num_hospitals=num_hospitals)
            _wait(run_id, home, log, folder=folder, server=server)
    finally:
        shutil.rmtree(home, ignore_errors=True)


def write_app(folder: Path, run_config: Mapping[str, Scalar]) -> Path:
    """Write a Flower app: the packages' sources, and a pyproject whose defaults are this run's settings."""
    for package in PACKAGES:
        shutil.copytree(
            ROOT / package, folder / package, ignore=lambda _, names: [n for n in names if n == "__pycache__"]
        )
    (folder / "pyproject.toml").write_text(tomli_w.dumps(_pyproject(run_config)))
    return folder


def _pyproject(run_config: Mapping[str, Scalar]) -> dict[str, Any]:
    sections: dict[str, dict[str, Scalar]] = {}
    for key, value in run_config.items():
        section, _, name = key.partition(".")
        sections.setdefault(section, {})[name] = value
    return {
        "build-system": {"requires": ["setuptools"], "build-backend": "setuptools.build_meta"},
        "project": {
            "name": "hospital-federation-simulation",
            "version": "0.1.0",
            "description": "A simulated federation of hospitals.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "hospital-federation",
                    "fab-include": [f"{package}/**/*.py" for package in PACKAGES],
                    "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
                    "config": sections,
                }
            }
        },
    }


def write_connection(home: Path, port: int) -> None:
    """Write Flower's configuration file: one SuperLink, on loopback."""
    connection = {"address": f"127.0.0.1:{port}", "insecure": True}
    content = {"superlink": {"default": _CONNECTION, _CONNECTION: connection}}
    (home / "config.toml").write_text(tomli_w.dumps(content))


@contextlib.contextmanager
def superlink(home: Path, port: int, log: Path) -> Iterator[ChildProcess]:
    """A SuperLink in simulation mode; it ends with the block, and with this process."""
    command = [program("flower-superlink"), "--simulation", "--insecure"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--disable-runtime-dependency-installation"]
    process = ChildProcess(command, log=log, env=_environment(home))
    process.start()
    try:
        _wait_until_healthy(process, port)
        yield process
    finally:
        process.stop(patience_s=15)


def _wait_until_healthy(process: ChildProcess, port: int) -> None:
    give_up_at = time.monotonic() + _START_TIMEOUT_S
    while process.is_running and time.monotonic() < give_up_at:
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=2) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.2)
    raise FederationError(
        "Flower's SuperLink did not start",
        why="see the log",
        fix=f"look at {process.log}, or use --engine embedded",
    )


def _submit(app: Path, home: Path, log: IO[bytes], *, num_hospitals: int) -> str:
    """Hand the app to the SuperLink; gives Flower's id of the run."""
    cores = len(os.sched_getaffinity(0))
    resources = {
        "num-supernodes": num_hospitals,
        "client-resources-num-cpus": 1,
        "init-args-num-cpus": cores,
    }
    options = " ".join(f"{key}={value}" for key, value in resources.items())
    answer = _flwr(home, log, "run", str(app), _CONNECTION, "--federation-config", options)
    run_id = answer.get("run-id")
    if not run_id:
        raise FederationError(
            "Flower did not take the run",
            why="see the log",
            fix=f"look at {log.name}, or use --engine embedded",
        )
    return str(run_id)


def _wait(run_id: str, home: Path, log: IO[bytes], *, folder: Path, server: ChildProcess) -> None:
    """Wait until Flower calls the run finished; raises FederationError when it has left no result.

    Asking costs a process, so it is done often only once the result is there. A question that fails (a busy
    machine) is asked again; only the SuperLink's own death ends the waiting.
    """
    asked_at = time.monotonic()
    while server.is_running:
        time.sleep(0.5)
        if not (folder / RESULT).exists() and time.monotonic() - asked_at < _ASK_EVERY_S:
            continue
        runs = _flwr(home, log, "list", _CONNECTION, "--run-id", run_id).get("runs") or [{}]
        asked_at = time.monotonic()
        if str(runs[0].get("status", "")).startswith("finished"):
            break
    if not (folder / RESULT).exists():
        raise FederationError(
            "the run on Ray left no result",
            why="the SuperLink died" if not server.is_running else "Flower calls it finished",
            fix=f"look at {log.name}, or use --engine embedded",
        )


def _flwr(home: Path, log: IO[bytes], *arguments: str) -> dict[str, Any]:
    """What a command of Flower's answers as JSON; empty when it fails."""
    # In a session of its own: Ctrl-C is for the ServerApp's clean stop, not for those who watch it.
    process = subprocess.run(
        [program("flwr"), *arguments, "--format", "json"],
        env=_environment(home),
        stdout=subprocess.PIPE,
        stderr=log,
        start_new_session=True,
        check=False,
    )
    try:
        answer = json.loads(process.stdout)
    except ValueError:
        answer = {}
    if not answer.get("success"):
        log.write(process.stdout)
        log.flush()
        return {}
    return dict(answer)


def _environment(home: Path) -> dict[str, str]:
    """The environment of Flower's and Ray's processes."""
    return flower_environment(
        home,
        RAY_USAGE_STATS_ENABLED="0",
        RAY_ENABLE_UV_RUN_RUNTIME_ENV="0",
        # Hospitals share the GPUs as in the embedded engine; Ray would hide them from whoever claims none.
        RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO="0",
    )
