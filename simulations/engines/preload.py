"""What worker processes import, once, in the fork server: importing this module does it all.

Nothing else may import it: it is the whole weight of training. Without the garbage collector, which would
look through everything again and again, it takes a fifth less; what is imported stays for good and is left
out of later collections, so that worker processes go on sharing its memory.
"""

import gc
import importlib

gc.disable()
try:
    importlib.import_module("simulations.engines.lazy_compiler").install()
    for _name in (
        "opacus",
        "flwr.clientapp",
        "dp_accounting.pld.privacy_loss_distribution",
        "scipy.stats",
        "client.app",
        "client.training.private",
        "client.training.plain",
        "client.self_test.start",
        "common.models.registry",
        "simulations.engines.worker",
        "simulations.scoring_process",
        # The command itself: a worker imports it again under another name.
        "typer",
        "simulations.flags",
    ):
        importlib.import_module(_name)
finally:
    gc.freeze()
    gc.enable()
