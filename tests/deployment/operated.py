"""A federation of real processes that the test starts, kills and asks one by one; nobody revives them."""

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from common.child_process import ChildProcess
from common.enrolment import ENROLMENT, Enrolment
from common.flower_programs import python_module
from common.settings import load, to_toml
from server.provisioning.new_federation import renew_server_certificate
from simulations.engines.rehearsal import SERVER, Rehearsal
from simulations.preparation import prepare
from simulations.scenario import make_scenario
from tests.deployment.federation import charged_rounds, closed, metrics, processes_of, result, until


class Operated:
    """The processes of a provisioned rehearsal, by name; the server is `server`."""

    def __init__(self, rehearsal: Rehearsal, *, hospitals: Sequence[str]) -> None:
        self.rehearsal, self.names = rehearsal, list(hospitals)
        self.folder, self.operator = rehearsal.folder, rehearsal.operator

    def set_up(
        self, name: str, *, prefix: Sequence[str] = (), environment: Mapping[str, str] | None = None
    ) -> None:
        """Say how a side is started: below `prefix`, with more in its environment."""
        is_server = name == SERVER
        folder = self.operator.path if is_server else self.rehearsal.hospital(name)
        command = python_module("server.cli" if is_server else "client.cli", "start", str(folder))
        self.rehearsal.processes[name] = ChildProcess(
            [*prefix, *command],
            log=folder / "logs" / "process.log",
            env=os.environ | {"OMP_NUM_THREADS": "1"} | dict(environment or {}),
            name=name,
        )

    def open_to(self, *addresses: str) -> None:
        """Have the server listen on every address of this machine, with `addresses` in its certificate."""
        file, port = self.operator.federation_toml, self.port
        text = file.read_text()
        changes = {
            f'listen = "127.0.0.1:{port}"': f'listen = "0.0.0.0:{port}"',
            "\nnames = []": f"\nnames = {json.dumps(list(addresses))}",
        }
        for old, new in changes.items():
            assert text.count(old) == 1, f"{old} in\n{text}"
            text = text.replace(old, new)
        file.write_text(text)
        renew_server_certificate(self.operator)

    def reach_by(self, name: str, address: str) -> None:
        """Have a hospital reach the server at `address` (host:port)."""
        path = self.rehearsal.hospital(name) / ENROLMENT
        changed = load(Enrolment, path).model_copy(update={"address": address})
        path.write_text(to_toml(changed))

    @property
    def port(self) -> int:
        """Of the open path."""
        return self.rehearsal.ports[SERVER]["fleet"]

    def start(self, *names: str) -> None:
        """Start sides that do not run; without names all."""
        for name in names or [SERVER, *self.names]:
            if name not in self.rehearsal.processes:
                self.set_up(name)
            self.rehearsal.processes[name].start()

    def resume(self) -> None:
        """`flower-server resume` in place of `start`."""
        command = python_module("server.cli", "resume", "--dir", str(self.operator.path))
        self.rehearsal.processes[SERVER].command = command
        self.start(SERVER)

    def kill(self, *names: str) -> None:
        """SIGKILL to the command alone; whatever it has started must go by itself."""
        for name in names:
            self.rehearsal.processes[name].kill()
            place = self.operator.path if name == SERVER else self.rehearsal.hospital(name)
            until(lambda place=place: not processes_of(place), patience_s=20, what=f"the end of {name}")

    def stop_the_run(self) -> None:
        """`flower-server stop`: the run ends after its open round."""
        command = python_module("server.cli", "stop", "--dir", str(self.operator.path))
        subprocess.run(command, check=True, capture_output=True, timeout=60)

    def server_ends(self, *, within_s: float = 180.0) -> int:
        """Exit code of the server."""
        server = self.rehearsal.processes[SERVER]
        until(
            lambda: not server.is_running, patience_s=within_s, what=f"its end; it said {self.said(SERVER)}"
        )
        return server.poll()

    def said(self, name: str) -> str:
        """All that the command has printed so far."""
        return self.rehearsal.processes[name].log.read_text()

    def works(self, name: str, mark: str) -> int:
        """Process id of a hospital's `supernode` or `worker_process`, as its command line says."""
        for pid in processes_of(self.rehearsal.hospital(name)):
            with contextlib.suppress(OSError):
                if mark in Path(f"/proc/{pid}/cmdline").read_text():
                    return pid
        raise AssertionError(f"{name} has no {mark}")

    def status(self, name: str) -> dict:
        """What the hospital's client says of itself."""
        try:
            return json.loads((self.rehearsal.hospital(name) / "state" / "status.json").read_text())
        except (OSError, ValueError):
            return {}

    def await_connected(self, *names: str, within_s: float = 90.0) -> None:
        """Until the hospitals are connected and their workers are ready."""
        for name in names or self.names:
            until(
                lambda name=name: self.status(name).get("connected") is True,
                patience_s=within_s,
                what=f"{name} connected",
            )

    def await_closed(self, number: int, *, within_s: float = 120.0) -> None:
        """Until this round has closed."""
        until(
            lambda: number in closed(self.folder),
            patience_s=within_s,
            what=f"round {number}; the server said {self.said(SERVER)}",
        )

    def await_training(self) -> None:
        """Until every hospital is in the middle of a round: charged and not answered."""
        until(
            lambda: all(
                any(not sealed for _, sealed in charged_rounds(self.folder, name)) for name in self.names
            ),
            what="all in training",
        )

    def outcomes(self, name: str) -> dict[int, str]:
        """How the hospital took part, by round."""
        return {
            line["round"]: line["outcome"] for line in metrics(self.folder) if line.get("hospital") == name
        }

    @property
    def status_of_run(self) -> str:
        """As result.json says."""
        return result(self.folder)["status"]


@contextlib.contextmanager
def operated(
    folder: Path,
    *,
    hospitals: int = 2,
    rounds: int = 3,
    settings: Sequence[str] = (),
    starts: bool = True,
    **flags: object,
) -> Iterator[Operated]:
    """Generated images, keys, certificates, and with `starts` every process; all gone afterwards."""
    flags |= {"hospitals": hospitals, "rounds": rounds, "engine": "processes", "out": str(folder)}
    ready = prepare(make_scenario(flags | {"set": tuple(settings)}))
    names = [hospital.name for hospital in ready.hospitals]
    with Rehearsal(ready.config, hospitals=names) as rehearsal:
        rehearsal.provision()
        federation = Operated(rehearsal, hospitals=names)
        try:
            if starts:
                federation.start()
            yield federation
        finally:
            for pid in processes_of(folder):  # nobody ends politely while it is stopped
                with contextlib.suppress(OSError):
                    os.kill(pid, signal.SIGCONT)
            rehearsal.stop()
            until(lambda: not processes_of(folder), patience_s=30, what="the end of every process")
