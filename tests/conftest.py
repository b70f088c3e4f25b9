"""Fixtures shared by all tests."""

import os
import tempfile
from pathlib import Path

import pytest

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")
os.environ.setdefault("FLWR_DISABLE_UPDATE_CHECK", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
# No test touches the ledger of the person who runs it.
os.environ["XDG_STATE_HOME"] = tempfile.mkdtemp(prefix="hospital-federation-tests-")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the real images; skips without it, fails without it in CI."""
    named = os.environ.get("HOSPITAL_FEDERATION_DATA")
    folder = Path(named) if named else Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        reason = f"no real images at {folder} (set HOSPITAL_FEDERATION_DATA)"
        if os.environ.get("CI") == "true":
            pytest.fail(reason)
        pytest.skip(reason)
    return folder


@pytest.fixture(scope="session")
def flower_identity() -> None:
    """Flower makes messages only inside a task; say which one this process is."""
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.task_id = TaskIdentity.node_id = 1
