"""Ten-line apps for the tests of the engines; workers import them by name."""

import gc
import os
import signal
import sys
import threading
import time

from flwr.app import Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

SECRET = "PLANTED^PATIENT"

client_app = ClientApp()


@client_app.train()
def train(message: Message, context: Context) -> Message:
    import torch

    request = message.content["request"]
    time.sleep(float(request.get("sleep", 0)))
    if request.get("kill-partition", -1) == context.node_config["partition-id"]:
        os.kill(os.getpid(), signal.SIGKILL)
    if request.get("fail-partition", -1) == context.node_config["partition-id"]:
        raise RuntimeError(SECRET)
    answer = MetricRecord(
        {
            "partition": int(context.node_config["partition-id"]),
            "partitions": int(context.node_config["num-partitions"]),
            "pid": os.getpid(),
            "threads": torch.get_num_threads(),
            "deterministic": int(torch.are_deterministic_algorithms_enabled()),
            "python-threads": threading.active_count(),
            "frozen": gc.get_freeze_count(),
            "compiler": int("torch._dynamo.eval_frame" in sys.modules),
            "configured": int(context.run_config["toy.number"]),
        }
    )
    return Message(RecordDict({"metrics": answer}), reply_to=message)


not_an_app = "text"
