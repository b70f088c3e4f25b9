"""The bundle that Flower carries: our three packages and nothing else, and both apps start from it alone."""

import io
import json
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path, PurePosixPath

import pytest
from flwr.cli.build import build_fab_from_disk

# Flower uses a name that its library `pathspec` has given up.
pytestmark = pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = {"common", "server", "client"}
LARGEST = 10 * 2**20
"""Bytes above which Flower's SuperLink refuses a bundle."""


@pytest.fixture(scope="module")
def bundle() -> bytes:
    return build_fab_from_disk(ROOT)


@pytest.fixture(scope="module")
def files(bundle) -> dict[PurePosixPath, bytes]:
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        return {PurePosixPath(name): archive.read(name) for name in archive.namelist()}


def test_it_holds_the_sources_of_three_packages_and_pyproject(files):
    carried = {path for path in files if path.parts[0] != ".info"}
    ours = {
        PurePosixPath(path.relative_to(ROOT).as_posix())
        for package in PACKAGES
        for path in (ROOT / package).rglob("*.py")
    }
    assert carried == ours | {PurePosixPath("pyproject.toml")}
    assert all(content == (ROOT / path).read_bytes() for path, content in files.items() if path in ours)
    assert {path.parts[0] for path in carried if len(path.parts) > 1} == PACKAGES


def test_it_is_small_and_the_same_each_time(bundle):
    assert len(bundle) < LARGEST
    assert build_fab_from_disk(ROOT) == bundle


def test_it_names_the_two_apps(files):
    app = tomllib.loads(files[PurePosixPath("pyproject.toml")].decode())["tool"]["flwr"]["app"]
    assert app["components"] == {"serverapp": "server.app:app", "clientapp": "client.app:app"}


def test_both_apps_start_from_it_alone(bundle, tmp_path):
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        archive.extractall(tmp_path)
    code = (
        "import json, sys\n"
        f"sys.path.insert(0, {str(tmp_path)!r})\n"
        "from server.app import app as server\n"
        "without_torch = 'torch' not in sys.modules\n"
        "from client.app import app as client\n"
        "ours = [m for n, m in sys.modules.items() if n.split('.')[0] in ('common', 'server', 'client')]\n"
        "files = sorted({m.__file__ for m in ours if m.__file__})\n"
        "strangers = [n for n in sys.modules if n.split('.')[0] in ('simulations', 'tests')]\n"
        "print(json.dumps([type(server).__name__, type(client).__name__, without_torch, files, strangers]))\n"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120, check=True
    )
    server, client, without_torch, loaded, strangers = json.loads(answer.stdout)
    assert (server, client) == ("ServerApp", "ClientApp")
    assert without_torch, "the server needs no torch"
    assert all(Path(file).is_relative_to(tmp_path) for file in loaded)
    assert len(loaded) > 30
    assert strangers == []
