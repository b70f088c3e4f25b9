"""A real SuperLink that asks, and a real hospital in operation that answers: TLS, keys, processes."""

import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import httpx
from flwr.app import Message, RecordDict
from flwr.common.serde import run_from_proto
from flwr.proto.control_pb2 import StartRunRequest
from flwr.proto.fab_pb2 import Fab
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PullTaskInputRequest
from flwr.supercore.heartbeat import HeartbeatSender, make_task_heartbeat_fn_http
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity
from flwr.superlink.grid.http_grid import HttpGrid

from client.connection import ask_server
from client.deployment.work import Work, read_work
from client.provisioning.code_list import accept
from client.server_answer import Answer
from common import messages
from common.bundle.bundle import bundle_bytes, bundle_sha256
from common.enrolment import Enrolment
from common.flower_programs import ROOT, flower_environment, free_port
from common.messages import SCHEMA_VERSION
from common.node_keys import load_private_key, load_public_key, make_key
from common.settings import load, to_toml
from tests.client.certificates import Authority
from tests.client.small_hospital import ENROLLED, envelope_of, make_hospital, make_plan
from tests.client.small_servers import SuperLink


def wait_for(condition, *, within_s: float, what: str = "it"):
    """The first true value of `condition`; AssertionError after `within_s`."""
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        with contextlib.suppress(httpx.HTTPError):
            if value := condition():
                return value
        time.sleep(0.05)
    raise AssertionError(f"{what} did not happen within {within_s} s")


class Federation(SuperLink):
    """Runs of any bundle, and messages to nodes."""

    def __init__(self, folder: Path, authority: Authority) -> None:
        super().__init__(folder, authority)
        self._grids: list[HttpGrid] = []
        self._hearts: list[HeartbeatSender] = []

    def __exit__(self, *_):
        for heart in self._hearts:
            heart.stop()
        for grid in self._grids:
            grid.close()
        super().__exit__()

    def start_run(self, bundle: bytes | None = None) -> HttpGrid:
        bundle = bundle_bytes() if bundle is None else bundle
        digest = hashlib.sha256(bundle).hexdigest()
        with contextlib.closing(self.control()) as control:
            control.StartRun(StartRunRequest(fab=Fab(hash_str=digest, content=bundle)))
        address, ca = f"127.0.0.1:{self.port}", self.authority.pem.encode()
        secret = SuperExecAuthHttpInterceptor(
            master_secret=b"x" * 32, protected_methods=frozenset({"/flwr.proto.Runtime/AcquireTask"})
        )
        version = RuntimeVersionHttpInterceptor(component_name="SuperExec")
        with RuntimeHttpClient.from_server_address(
            address, False, ca, interceptors=[version, secret]
        ) as runtime:
            token = runtime.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-serverapp"])).token
        grid = HttpGrid(address, False, ca, token=token)
        given = grid._runtime_client.PullTaskInput(PullTaskInputRequest())
        grid.set_run(run_from_proto(given.run))
        TaskIdentity.task_id, TaskIdentity.run_id = given.task_id, given.run.run_id
        TaskIdentity.node_id = 1
        self._grids.append(grid)
        heart = HeartbeatSender(make_task_heartbeat_fn_http(grid._runtime_client))
        heart.start()
        self._hearts.append(heart)
        return grid


def ask(grid: HttpGrid, node_id: int, request: Message, *, within_s: float = 40.0) -> Message:
    """Send a message made for any node to `node_id`; give the reply."""
    return answer_to(grid, send(grid, node_id, request), within_s=within_s)


def send(grid: HttpGrid, node_id: int, request: Message) -> str:
    metadata = request.metadata
    own = Message(request.content, node_id, metadata.message_type, ttl=metadata.ttl)
    (message_id,) = grid.push_messages([own])
    return message_id


def answer_to(grid: HttpGrid, message_id: str, *, within_s: float = 40.0) -> Message:
    return wait_for(lambda: list(grid.pull_messages([message_id])), within_s=within_s, what="a reply")[0]


def hello() -> Message:
    return Message(RecordDict({messages.ENVELOPE: envelope_of({}).to_record()}), 7, messages.HELLO)


class RunningHospital:
    """A hospital's folder and its client, a process of its own."""

    def __init__(
        self, folder: Path, authority: Authority, port: int, *, name: str = "north", **policy
    ) -> None:
        self.authority, self.port = authority, port
        self.runtime_port, self.health_port = free_port(), free_port()
        self.toml = make_hospital(folder, name=name, **policy)
        self.folder = folder
        connection = f"\n[connection]\nruntime-port = {self.runtime_port}\nhealth-port = {self.health_port}\n"
        text = self.toml.read_text().split("[connection]")[0]
        self.toml.write_text(text + connection)
        self.key = folder / "keys" / "hospital.key"
        self.key.parent.mkdir()
        self.public = folder / "keys" / "hospital.key.pub"
        make_key(self.key, self.public, comment=name)
        self.enrol(name)
        self.state.mkdir(exist_ok=True)
        accept(self.state, bundle_sha256(), note="test")
        self._process: subprocess.Popen[bytes] | None = None
        self.output = folder / "output.txt"

    @property
    def state(self) -> Path:
        return self.folder / "state"

    def enrol(self, name: str) -> None:
        enrolment = Enrolment(
            federation="test",
            hospital=name,
            enrolled_patients=ENROLLED,
            fingerprint=load_public_key(self.public).fingerprint,
            address=f"127.0.0.1:{self.port}",
            release="0.1.0",
            wire_schema=SCHEMA_VERSION,
            bundle_sha256=bundle_sha256(),
            ca_certificate=self.authority.pem,
            plan=make_plan(),
        )
        (self.folder / "enrolment.toml").write_text(to_toml(enrolment))

    def ask_server(self) -> Answer:
        """As the supervisor asks."""
        enrolment = load(Enrolment, self.folder / "enrolment.toml")
        return ask_server(enrolment, load_private_key(self.key))

    def start(self, **environment: str) -> None:
        code = (
            "import sys; from pathlib import Path; from client.deployment.supervisor import start\n"
            "from common.errors import FederationError\n"
            "try: sys.exit(int(start(Path(sys.argv[1]))))\n"
            "except FederationError as error: sys.exit(str(error))\n"
        )
        env = {**flower_environment(self.folder), "XDG_STATE_HOME": str(self.folder), "OMP_NUM_THREADS": "1"}
        with self.output.open("ab") as output:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code, str(self.folder)],
                stdout=output,
                stderr=output,
                env={**env, **environment},
                cwd=ROOT,
            )

    @property
    def pid(self) -> int:
        return self._process.pid

    def wait(self, within_s: float = 20.0) -> int:
        return self._process.wait(within_s)

    def end(self) -> int:
        if self._process is None:
            return 0
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(25)
        except subprocess.TimeoutExpired:
            self._process.kill()
            raise

    def said(self) -> str:
        return self.output.read_text() if self.output.exists() else ""

    @property
    def work(self) -> Work:
        return read_work(self.state / "work.json")

    def status(self) -> dict:
        try:
            return json.loads((self.state / "status.json").read_text())
        except FileNotFoundError:
            return {}

    def await_ready(self, within_s: float = 60.0) -> None:
        wait_for(
            lambda: self.status().get("connected") and self.work.phase == "idle" or self._fail_if_ended(),
            within_s=within_s,
            what=f"the hospital's readiness; it said: {self.said()}",
        )

    def _fail_if_ended(self) -> bool:
        assert self._process.poll() is None, self.said()
        return False

    def audit(self) -> list[dict]:
        path = self.state / "audit.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def processes(self) -> dict[str, int]:
        """SuperNode and worker of this hospital, by what stands in their command lines."""
        found = {}
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):
                line = (entry / "cmdline").read_bytes().decode(errors="replace")
                if str(self.folder) not in line or "common.child_process" in line:
                    continue
                for name, mark in {"supernode": "supernode_process", "worker": "worker_process"}.items():
                    if mark in line:
                        found[name] = int(entry.name)
        return found


def is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
