"""A hospital's worker without torch: takes tasks of a real SuperNode and answers them with numpy.

From the command line: `python -m tests.server.deployment.toy_hospital NAME ENROLLED PORT SECRET SECONDS`.
"""

import importlib.metadata
import sys
import time
from pathlib import Path

import httpx
from flwr.proto.runtime_pb2 import AcquireTaskRequest, PushTaskOutputRequest
from flwr.supercore.inflatable import inflatable_utils
from flwr.supercore.interceptors import (
    RuntimeTokenHttpInterceptor,
    RuntimeVersionHttpInterceptor,
    SuperExecAuthHttpInterceptor,
)
from flwr.supercore.runtime import RuntimeHttpClient
from flwr.supernode.runtime.run_clientapp import pull_task_input, push_message

from common import messages
from tests.server.fake_federation import NumpyHospital

# A SuperNode offers the task before it has the message's objects; Flower would look again after 1, 2, 4 s.
inflatable_utils.pull_and_inflate_object_from_tree.__kwdefaults__.update(
    initial_backoff=0.02, backoff_cap=0.1
)


class ToyHospital(NumpyHospital):
    def __init__(self, name: str, enrolled: int, seconds: float) -> None:
        super().__init__(name, enrolled)
        self.seconds, self.began = seconds, 0.0

    def __call__(self, request):
        self.began = time.time()
        if request.metadata.message_type == messages.TRAIN:
            time.sleep(self.seconds)
        return super().__call__(request)

    def introduction(self):
        return super().introduction() | {
            "version": importlib.metadata.version("hospital-federation"),
            "flwr": importlib.metadata.version("flwr"),
        }

    def metrics(self, request, round_number):
        times = {"training-started": self.began, "training-ended": time.time()}
        return super().metrics(request, round_number) | times


def connect(port: int, *interceptors) -> RuntimeHttpClient:
    version = RuntimeVersionHttpInterceptor(component_name="flwr-clientapp")
    return RuntimeHttpClient.from_server_address(
        f"127.0.0.1:{port}", True, None, interceptors=[version, *interceptors]
    )


def work(hospital: ToyHospital, port: int, secret: bytes) -> None:
    protected = frozenset({"/flwr.proto.Runtime/AcquireTask"})
    doorbell = connect(port, SuperExecAuthHttpInterceptor(master_secret=secret, protected_methods=protected))
    while True:
        try:
            answer = doorbell.AcquireTask(AcquireTaskRequest(supported_task_types=["flwr-clientapp"]))
        except httpx.HTTPError:
            answer = None
        if answer is None or not answer.token:
            time.sleep(0.05)
            continue
        client = connect(port, RuntimeTokenHttpInterceptor(answer.token))
        request, context, _, _ = pull_task_input(client)
        print(f"{time.time():.3f} {request.metadata.message_type} {request.metadata.message_id}", flush=True)
        push_message(client, hospital(request), context)
        client.PushTaskOutput(PushTaskOutputRequest(sub_status="completed", details=""))
        client.close()


if __name__ == "__main__":
    name, enrolled, port, secret, seconds = sys.argv[1:]
    work(ToyHospital(name, int(enrolled), float(seconds)), int(port), Path(secret).read_bytes())
