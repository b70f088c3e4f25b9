"""Flower's own SuperLink, told to be sparing with memory, in a process of ours.

    python -m server.deployment.superlink_process OPTIONS_OF_FLOWER_SUPERLINK

Flower opens up to 15 connections to its database for the messages and as many for their objects, each with
64 MB of cache and 256 MB of the file mapped into memory: room for many large models. The kernel's own cache
holds the same pages once, and gives them back when memory is short. And see `rings`.
"""

import sys

import flwr.superlink.main  # noqa: F401 - all that is imported later otherwise
from flwr.supercore import sql_mixin
from flwr.superlink.cli import flower_superlink

from server.deployment.rings import look_for_rings

_PRAGMAS = {"cache_size": "-1000", "mmap_size": "0"}
"""KiB of cache of one connection (negative by SQLite's rule), bytes mapped."""


def spare_memory() -> None:
    """Put our settings in place of Flower's. Raises RuntimeError where Flower has none (any more)."""
    settings = getattr(sql_mixin, "SQLITE_PRAGMAS", None)
    if not settings or not _PRAGMAS.keys() <= dict(settings).keys():
        raise RuntimeError("this release of Flower has no settings for its database in sql_mixin")
    vars(sql_mixin)["SQLITE_PRAGMAS"] = tuple((dict(settings) | _PRAGMAS).items())
    look_for_rings()


def main() -> None:
    """Be `flower-superlink`."""
    spare_memory()
    sys.argv[0] = "flower-superlink"
    flower_superlink()


if __name__ == "__main__":
    main()
