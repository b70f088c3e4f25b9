"""A real federation on loopback: operator's folder, SuperLink, front, SuperNodes with toy workers."""

import json
import os
import signal
import ssl
import subprocess
import sys
import time
from pathlib import Path

import httpx

from common.child_process import ChildProcess
from common.flower_programs import flower_environment, free_port, program, python_module
from common.node_keys import load_private_key, load_public_key, make_key
from common.parameters import write_safetensors
from server.deployment.federation_grid import FederationGrid
from server.deployment.server_process import acquire_task
from server.provisioning.new_federation import make_federation, plan_federation
from server.provisioning.operator_config import OperatorFolder
from server.provisioning.roster import enroll
from tests.server.fake_federation import some_parameters

PLAIN = {"optimizer": "plain", "ema-decay": 0.0, "final-model": "last"}
ROOT = Path(__file__).resolve().parents[3]


def make_folder(path: Path, **sections) -> OperatorFolder:
    ports = [free_port() for _ in range(3)]
    values = {
        "federation": {"name": "small", "rounds": 3},
        "privacy": {"local-steps": 2},
        "server": {"patience-s": 60.0, "deadline-s": 60.0, "quorum": 2, **PLAIN},
        "runtime": {"expected-hospitals": 2, "initial-weights": str(path.parent / "initial.safetensors")},
        "network": {
            "address": f"localhost:{ports[0]}",
            "listen": f"127.0.0.1:{ports[0]}",
            "superlink-port": ports[1],
            "health-port": ports[2],
        },
    }
    for name, section in sections.items():
        values.setdefault(name, {}).update(section)
    write_safetensors(path.parent / "initial.safetensors", some_parameters(0))
    return make_federation(path, plan_federation(values))


class Hospital:
    """Key, SuperNode and worker of one hospital."""

    def __init__(self, folder: OperatorFolder, name: str, *, enrolled: int = 100, enrol: bool = True) -> None:
        self.home, self.folder, self.name, self.enrolled = folder.path.parent / name, folder, name, enrolled
        self.home.mkdir()
        self.key = self.home / "hospital.key"
        self.public = self.home / "hospital.key.pub"
        make_key(self.key, self.public, comment=name)
        if enrol:
            self.enrol()
        self.port = free_port()
        self.secret = self.home / "secret.bin"
        self.secret.write_bytes(b"s" * 32)
        self.supernode: ChildProcess | None = None
        self.worker: ChildProcess | None = None

    @property
    def public_key(self):
        return load_public_key(self.public)

    def enrol(self) -> None:
        enroll(self.folder.roster, name=self.name, key=self.public_key, enrolled_patients=self.enrolled)

    def start(self, *, seconds: float = 0.0, address: str = "", worker: bool = True) -> "Hospital":
        address = address or self.folder.config().network.address
        command = [
            *(program("flower-supernode"), "--superlink", address),
            *("--root-certificates", str(self.folder.ca_certificate)),
            *("--auth-supernode-private-key", str(self.key), "--isolation", "process"),
            *(
                "--superexec-auth-secret-file",
                str(self.secret),
                "--host",
                "127.0.0.1",
                "--port",
                str(self.port),
            ),
        ]
        environment = flower_environment(self.home / "flower")
        self.supernode = ChildProcess(command, log=self.home / "supernode.log", env=environment)
        self.supernode.start()
        if worker:
            self.start_worker(seconds=seconds)
        return self

    def start_worker(self, *, seconds: float = 0.0) -> None:
        arguments = (self.name, str(self.enrolled), str(self.port), str(self.secret), str(seconds))
        command = python_module("tests.server.deployment.toy_hospital", *arguments)
        environment = flower_environment(self.home / "flower", OMP_NUM_THREADS="1")
        self.worker = ChildProcess(command, log=self.home / "worker.log", env=environment)
        self.worker.start()

    def stop(self, *, kill: bool = False) -> None:
        for child in (self.worker, self.supernode):
            if child is not None:
                child.stop(0.0 if kill else 5.0)

    @property
    def received(self) -> list[tuple[float, str, str]]:
        """Time, type and id of every message that the worker took."""
        path = self.home / "worker.log"
        lines = path.read_text().splitlines() if path.exists() else []
        fields = [line.split() for line in lines]
        return [(float(f[0]), f[1], f[2]) for f in fields if len(f) == 3 and f[0].replace(".", "").isdigit()]

    @property
    def private_key(self):
        return load_private_key(self.key)


class Server:
    """`python -m server.deployment.supervisor` as a process of its own."""

    def __init__(self, folder: OperatorFolder) -> None:
        self.folder = folder
        self.output = folder.path.parent / "server.out"
        self.process: subprocess.Popen | None = None

    def start(self, *arguments: str) -> "Server":
        code = (
            "import sys; from pathlib import Path; from server.deployment.supervisor import start; "
            "from server.provisioning.operator_config import OperatorFolder; "
            f"sys.exit(start(OperatorFolder(Path({str(self.folder.path)!r})), {', '.join(arguments)}))"
        )
        with self.output.open("ab") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code],
                cwd=ROOT,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
                stdout=out,
                stderr=out,
            )
        return self

    def wait(self, timeout_s: float) -> int:
        return self.process.wait(timeout_s)

    def signal(self, number: int) -> None:
        self.process.send_signal(number)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def run(self) -> Path | None:
        return self.folder.run_folder()

    def metrics(self) -> list[dict]:
        path = self.run / "metrics.jsonl" if self.run else None
        lines = path.read_text().splitlines() if path and path.exists() else []
        return [json.loads(line) for line in lines if line.endswith("}")]

    @property
    def closed(self) -> list[int]:
        return [line["round"] for line in self.metrics() if "closed" in line]

    def result(self) -> dict:
        return json.loads((self.run / "result.json").read_text())

    def children(self) -> dict[str, int]:
        return json.loads(self.folder.server_json.read_text())["processes"]


def until(condition, timeout_s: float = 30.0, *, what: str = "") -> None:
    give_up_at = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < give_up_at, f"not within {timeout_s} s: {what or condition}"
        time.sleep(0.05)


def https(folder: OperatorFolder, port: int) -> httpx.Client:
    context = ssl.create_default_context(cafile=str(folder.ca_certificate))
    return httpx.Client(base_url=f"https://localhost:{port}", verify=context, trust_env=False, timeout=30)


def open_grid(folder: OperatorFolder) -> FederationGrid:
    """The Grid of a task that waits at the SuperLink, in this process."""
    from flwr.proto.runtime_pb2 import PullTaskInputRequest
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity

    address, authority = (
        f"127.0.0.1:{folder.config().network.superlink_port}",
        folder.ca_certificate.read_bytes(),
    )
    token = acquire_task(address, authority, folder.superexec_secret.read_bytes())
    grid = FederationGrid(address, authority=authority, token=token, roster=folder.roster, state=folder.state)
    task = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
    TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
    TaskIdentity.node_id = task.context.node_id
    grid.set_run(Run.create_empty(run_id=task.run.run_id))
    return grid
