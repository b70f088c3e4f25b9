"""The process in which the ServerApp runs: takes its task from the SuperLink, installs nothing of it.

From the command line: `python -m server.deployment.server_process DIR RUN_FOLDER`.
"""

import contextlib
import logging
import sys
import time
from pathlib import Path

import httpx
from flwr.app import Context, RecordDict
from flwr.proto.runtime_pb2 import (
    AcquireTaskRequest,
    PullTaskInputRequest,
    PullTaskInputResponse,
    PushTaskOutputRequest,
    SendTaskHeartbeatRequest,
)
from flwr.supercore.heartbeat import HeartbeatSender
from flwr.supercore.interceptors import RuntimeVersionHttpInterceptor, SuperExecAuthHttpInterceptor
from flwr.supercore.run import Run, RunNotRunningException
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supercore.task_identity import TaskIdentity

from common.config import FederationConfig
from common.errors import ConfigError, FederationError, ModelError
from common.files import write_bytes_atomically
from common.settings import to_flat
from server.deployment.endings import LAST_ERROR, Ending
from server.deployment.federation_grid import FederationGrid
from server.provisioning.operator_config import OperatorConfig, OperatorFolder

TASK_TYPE = "flwr-serverapp"
_PATIENCE_S, _PAUSE_S = 60.0, 0.1

log = logging.getLogger("federation")


def run_config(config: OperatorConfig, folder: OperatorFolder, run_folder: Path) -> FederationConfig:
    """The federation's settings for this run: where its folder, its roster and all receipts are."""
    places = {"run_folder": run_folder, "roster": folder.roster, "receipts": folder.receipts}
    runtime = config.runtime.model_copy(update={name: str(path) for name, path in places.items()})
    sections = {name: getattr(config, name) for name in FederationConfig.model_fields}
    return FederationConfig(**sections | {"runtime": runtime})


def serve(folder: OperatorFolder, run_folder: Path) -> Ending:
    """Take the task, run the installed ServerApp, hand the task back."""
    config = folder.config()
    authority = folder.ca_certificate.read_bytes()
    address = f"127.0.0.1:{config.network.superlink_port}"
    token = acquire_task(address, authority, folder.superexec_secret.read_bytes())
    grid = FederationGrid(address, authority=authority, token=token, roster=folder.roster, state=folder.state)
    grid.audit = run_folder / "audit.jsonl"
    client = grid._runtime_client  # Flower's own ServerApp process reaches for it in the same way
    heartbeat = HeartbeatSender(lambda: _heartbeat(client))
    heartbeat.start()
    sub_status = "failed"
    try:
        task = client.PullTaskInput(PullTaskInputRequest())
        _run_app(grid, task, run_config(config, folder, run_folder))
        sub_status = "completed"
    finally:
        grid._retry_invoker.max_tries = 1
        try:
            client.PushTaskOutput(PushTaskOutputRequest(sub_status=sub_status, details=""))
        except (httpx.HTTPError, RunNotRunningException):
            log.warning("the SuperLink did not take the end of the task")
        grid.close()
    return Ending.DONE


def acquire_task(address: str, authority: bytes, secret: bytes) -> str:
    """The token of the run that waits for a ServerApp. Raises FederationError after 60 s without one."""
    protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    client = RuntimeHttpClient.from_server_address(
        address,
        False,
        authority,
        interceptors=[
            RuntimeVersionHttpInterceptor(component_name="SuperExec"),
            SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected),
        ],
    )
    give_up_at = time.monotonic() + _PATIENCE_S
    try:
        while time.monotonic() < give_up_at:
            try:
                answer = client.AcquireTask(AcquireTaskRequest(supported_task_types=[TASK_TYPE]))
            except httpx.TransportError:
                answer = None
            if answer is not None and answer.token:
                return str(answer.token)
            time.sleep(_PAUSE_S)
    finally:
        client.close()
    raise RunNotRunningException


def _run_app(grid: FederationGrid, task: PullTaskInputResponse, config: FederationConfig) -> None:
    from server.app import app

    if config.claims_privacy:  # else the first reply of each run would wait for it
        import dp_accounting.pld.privacy_loss_distribution  # noqa: F401

    TaskIdentity.task_id, TaskIdentity.run_id = task.task_id, task.run.run_id
    TaskIdentity.node_id = task.context.node_id
    grid.set_run(Run.create_empty(run_id=task.run.run_id))
    context = Context(
        run_id=task.run.run_id,
        node_id=task.context.node_id,
        node_config={},
        state=RecordDict(),
        run_config=dict(to_flat(config)),
    )
    app(grid, context)


def _heartbeat(client: RuntimeHttpClient) -> bool:
    """Flower calls a task dead after 60 s without this; one that has ended shows at the next real call."""
    try:
        client.SendTaskHeartbeat(SendTaskHeartbeatRequest())
    except httpx.HTTPStatusError as error:
        return error.response.status_code < 500
    except httpx.HTTPError:
        return False
    return True


def main() -> None:
    """Run; say on exit how it went."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", level=logging.INFO, stream=sys.stdout)
    for other in ("httpx", "flwr"):
        logging.getLogger(other).setLevel(logging.WARNING)
    folder, run_folder = OperatorFolder(Path(sys.argv[1])), Path(sys.argv[2])
    try:
        ending = serve(folder, run_folder)
    except FederationError as error:
        log.error("%s", error)
        _leave(folder, str(error))
        is_setting = isinstance(error, ConfigError | ModelError)
        ending = Ending.BAD_CONFIGURATION if is_setting else Ending.GAVE_UP
    except (RunNotRunningException, httpx.HTTPError) as error:
        log.warning("Flower's run is gone (%s)", type(error).__name__)
        ending = Ending.TRY_AGAIN
    except Exception as error:
        log.exception("the server process ends with an error that nobody has foreseen")
        _leave(folder, f"it met an unforeseen {type(error).__name__}; logs/federation.log says where")
        ending = Ending.CRASHED
    sys.exit(ending)


def _leave(folder: OperatorFolder, words: str) -> None:
    with contextlib.suppress(OSError):
        write_bytes_atomically(folder.state / LAST_ERROR, words.encode())


if __name__ == "__main__":
    main()
