"""The bundle that goes to Flower: rebuilt it is the same, and it holds nothing that could run."""

import hashlib
import io
import tomllib
import zipfile

import pytest

from common.bundle.bundle import build_bundle, bundle_bytes, bundle_sha256


@pytest.mark.filterwarnings("ignore:GitWildMatchPattern:DeprecationWarning")
def test_the_packaged_bundle_is_what_this_release_builds():
    assert build_bundle() == bundle_bytes()
    assert bundle_sha256() == hashlib.sha256(bundle_bytes()).hexdigest()


def test_it_names_the_apps_and_holds_no_code():
    with zipfile.ZipFile(io.BytesIO(bundle_bytes())) as bundle:
        names = set(bundle.namelist())
        description = tomllib.loads(bundle.read("pyproject.toml").decode())
    assert names == {"pyproject.toml", "BUNDLE.md", ".info/CONTENT"}
    assert description["tool"]["flwr"]["app"]["components"] == {
        "serverapp": "server.app:app",
        "clientapp": "client.app:app",
    }
