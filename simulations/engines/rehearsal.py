"""The rehearsal engine: a real `flower-server` and real `flower-client`s on loopback, TLS and keys on.

What institutions run, on one machine: the operator's folder lies in `rehearsal/` of the run folder, each
hospital's key and enrolment beside its `hospital.toml`. Like a service manager it starts again whoever dies.
"""

import os
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from client.deployment.hospital_folder import HOSPITAL_TOML
from client.provisioning.code_list import accept
from common.bundle.bundle import bundle_sha256
from common.child_process import ChildProcess
from common.config import FederationConfig
from common.enrolment import ENROLMENT
from common.errors import FederationError
from common.exit_codes import ExitCode
from common.files import write_bytes_atomically, write_json_atomically
from common.flower_programs import free_ports, python_module
from common.hospital_config import ConnectionConfig, HospitalConfig
from common.node_keys import load_public_key, make_key
from common.settings import load, to_toml
from server.provisioning.enrolments import enrol_hospital
from server.provisioning.new_federation import make_federation
from server.provisioning.operator_config import NetworkSection, OperatorConfig, OperatorFolder
from server.run_folder import RESULT
from simulations.preparation import HOSPITALS

REHEARSAL, PROCESSES = "rehearsal", "rehearsal.json"
"""The operator's folder, and the list of who runs: process ids and ports."""
SERVER = "server"
_ENDINGS = {int(code) for code in ExitCode} - {ExitCode.FAILED, ExitCode.BAD_CONFIGURATION}
_MOST_RESTARTS = 5
_RESTART_AFTER_S, _LOOK_EVERY_S = 1.0, 0.1


def run_in_processes(config: FederationConfig, *, hospitals: Sequence[str]) -> None:
    """Run the federation of a prepared run folder to its end. Raises FederationError with the log's place."""
    with Rehearsal(config, hospitals=hospitals) as rehearsal:
        rehearsal.start()
        rehearsal.wait()


class Rehearsal:
    """A federation on this machine; as a context manager it ends every process that it has started."""

    def __init__(self, config: FederationConfig, *, hospitals: Sequence[str]) -> None:
        self.folder = Path(config.runtime.run_folder)
        self.operator = OperatorFolder(self.folder / REHEARSAL)
        self._config, self._names = config, tuple(hospitals)
        self._restarts: dict[str, int] = {}
        self.processes: dict[str, ChildProcess] = {}
        """`server`, then each hospital by its name."""
        self.ports: dict[str, dict[str, int]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()

    def start(self) -> None:
        """Provision both sides anew and start every process."""
        self.provision()
        self.launch()

    def launch(self) -> None:
        """Start every process; says who runs where in `rehearsal.json`."""
        self._add(SERVER, python_module("server.cli", "start", str(self.operator.path)))
        for name in self._names:
            self._add(name, python_module("client.cli", "start", str(self.hospital(name))))
        for process in self.processes.values():
            process.start()
        self._tell()

    def provision(self) -> None:
        """Make the operator's folder, enrol every hospital; keys of an earlier session stay."""
        listen, superlink, health, *others = free_ports(3 + 2 * len(self._names))
        address = f"127.0.0.1:{listen}"
        network = NetworkSection(
            address=address, listen=address, superlink_port=superlink, health_port=health
        )
        self.ports = {SERVER: {"fleet": listen, "superlink": superlink, "health": health}}
        shutil.rmtree(self.operator.path, ignore_errors=True)
        make_federation(self.operator.path, operator_config(self._config, network))
        for number, name in enumerate(self._names):
            runtime, own_health = others[2 * number : 2 * number + 2]
            self.ports[name] = {"runtime": runtime, "health": own_health}
            connection = ConnectionConfig(runtime_port=runtime, health_port=own_health)
            self._provision_hospital(self.hospital(name), connection)

    def hospital(self, name: str) -> Path:
        """Folder of a hospital."""
        return self.folder / HOSPITALS / name

    def wait(self) -> ExitCode:
        """Wait until the server has ended by itself; whoever dies before is started again."""
        while True:
            for name, process in self.processes.items():
                if (status := process.poll()) is not None:
                    if name == SERVER and status in _ENDINGS:
                        return ExitCode(status)
                    self._revive(name, process, status)
            time.sleep(_LOOK_EVERY_S)

    def stop(self) -> None:
        """End all processes: the hospitals first, so that they sign off."""
        for process in self.processes.values():
            process.ask_to_end()
        for process in self.processes.values():
            process.stop(patience_s=10.0)

    def _provision_hospital(self, folder: Path, connection: ConnectionConfig) -> None:
        config = load(HospitalConfig, folder / HOSPITAL_TOML)
        threads = max(1, len(os.sched_getaffinity(0)) // len(self._names))
        site = config.site.model_copy(update={"threads": threads})
        config = config.model_copy(update={"connection": connection, "site": site})
        write_bytes_atomically(folder / HOSPITAL_TOML, to_toml(config).encode())
        private = folder / connection.key
        public = private.with_name(private.name + ".pub")
        if not private.exists():
            make_key(private, public, comment=config.hospital.name)
        accept(folder / "state", bundle_sha256(), note="as installed")
        _, _, enrolment = enrol_hospital(
            self.operator,
            name=config.hospital.name,
            key=load_public_key(public),
            enrolled_patients=config.hospital.enrolled_patients,
        )
        write_bytes_atomically(folder / ENROLMENT, enrolment.read_bytes())

    def _add(self, name: str, command: Sequence[str]) -> None:
        folder = self.operator.path if name == SERVER else self.hospital(name)
        self.processes[name] = ChildProcess(command, log=folder / "logs" / "process.log", name=name)

    def _revive(self, name: str, process: ChildProcess, status: int) -> None:
        """Start a process again that ended too early; one that is left by choice (status 0) stays away.

        Raises FederationError for one that would not do better: a server whose run has failed, say.
        """
        if status == 0 and name != SERVER:
            return
        self._restarts[name] = self._restarts.get(name, 0) + 1
        has_failed = name == SERVER and status == ExitCode.FAILED and (self.folder / RESULT).exists()
        if self._restarts[name] > _MOST_RESTARTS or status == ExitCode.BAD_CONFIGURATION or has_failed:
            raise FederationError(
                f"{name} of the rehearsal ended with status {status}",
                why="\n".join(process.last_lines(6)),
                fix=f"look at {process.log}",
            )
        time.sleep(_RESTART_AFTER_S)
        process.start()
        self._tell()

    def _tell(self) -> None:
        content: dict[str, Any] = {
            name: {"pid": process.pid, "ports": self.ports[name], "log": str(process.log)}
            for name, process in self.processes.items()
        }
        write_json_atomically(self.folder / PROCESSES, content)


def operator_config(config: FederationConfig, network: NetworkSection) -> OperatorConfig:
    """The operator's settings for a simulation's federation."""
    sections = {name: getattr(config, name) for name in FederationConfig.model_fields}
    sections["runtime"] = config.runtime.model_copy(update={"hospitals": "", "roster": "", "receipts": ""})
    return OperatorConfig(network=network, **sections)
