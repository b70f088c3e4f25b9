"""Making an operator's folder: new, readable by its owner only, and gone again when filling it fails."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from common.errors import ConfigError
from server.provisioning.operator_config import OperatorFolder


@contextmanager
def new_folder(path: Path) -> Iterator[OperatorFolder]:
    """A new folder to fill (0700); what was put in is removed when that fails.

    Raises ConfigError when `path` holds anything already.
    """
    was_there = path.exists()
    if was_there and (not path.is_dir() or any(path.iterdir())):
        raise ConfigError(
            f"{path} is not empty",
            why="keys, certificates, settings and runs are never written over",
            fix="choose a new folder, or move that one away",
        )
    folder = OperatorFolder(path)
    folder.path.mkdir(parents=True, exist_ok=True, mode=0o700)
    folder.path.chmod(0o700)
    try:
        yield folder
    except BaseException:  # half a federation would only be in the way
        for made in folder.path.iterdir():
            shutil.rmtree(made) if made.is_dir() else made.unlink()
        if not was_there:
            folder.path.rmdir()
        raise


def make_parts(folder: OperatorFolder) -> None:
    """Make the folders inside, for their owner only; those that are there stay."""
    own = (folder.state, folder.flower_home, folder.logs, folder.runs, folder.enrolments, folder.receipts)
    holders = (folder.ca_key.parent, folder.server_key.parent, folder.superexec_secret.parent)
    for part in (*own, *holders):
        part.mkdir(exist_ok=True, mode=0o700)
