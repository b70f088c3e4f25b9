"""Flower's own SuperNode, with two guards, in a process of ours.

    python -m client.deployment.supernode_process OPTIONS_OF_FLOWER_SUPERNODE

1. It speaks to its server and to nobody else, wherever that server may point.
2. It does not look into the bundle of a run: Flower's would unpack it before its digest is compared, and a
   bundle that is no archive would end it in silence. The worker refuses such a bundle by name.
"""

import hashlib
import sys

from flwr.app.user_config import UserConfig
from flwr.proto.fab_pb2 import Fab as ProtoFab
from flwr.supercore.fab import Fab
from flwr.supercore.run import Run
from flwr.supernode import fleet_http_connection, start_client_internal
from flwr.supernode.cli import flower_supernode

from client.deployment.fleet_client import GuardedFleetClient


def put_guards() -> None:
    """Put them into Flower's modules. Raises RuntimeError where Flower has no place for them (any more)."""
    guards = (
        (fleet_http_connection, "FleetHttpClient", GuardedFleetClient),
        (fleet_http_connection, "fab_from_proto", _as_it_came),
        (start_client_internal, "get_fused_config_from_fab", _no_config),
    )
    for module, name, guard in guards:
        if not hasattr(module, name):
            raise RuntimeError(f"{module.__name__} of this release of Flower has no {name} to be guarded")
        setattr(module, name, guard)


def _as_it_came(proto: ProtoFab) -> Fab:
    """The bundle under its own digest, whatever the server calls it."""
    return Fab(hashlib.sha256(proto.content).hexdigest(), proto.content, {})


def _no_config(bundle: bytes, run: Run) -> UserConfig:
    """No setting of a run comes from its bundle; tasks name the bundle that came, not the promised one."""
    run.fab_hash = hashlib.sha256(bundle).hexdigest()
    return {}


def main() -> None:
    """Be `flower-supernode`."""
    put_guards()
    sys.argv[0] = "flower-supernode"
    flower_supernode()


if __name__ == "__main__":
    main()
