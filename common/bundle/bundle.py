"""The bundle: Flower asks for one with every run, and hospitals compare its digest with their own list.

It holds a description and nothing that runs. Both sides execute the release that is installed there.
"""

import hashlib
import importlib.metadata
from functools import lru_cache
from importlib import resources

import tomli_w

from common.messages import SCHEMA_VERSION

FILE = "hospital-federation.fab"
_NOTE = """This bundle names a release of hospital-federation and holds no code.
Hospitals and server run what is installed on their own machines.
"""


@lru_cache(maxsize=1)
def bundle_bytes() -> bytes:
    """The bundle of this release."""
    return (resources.files("common.bundle") / FILE).read_bytes()


def bundle_sha256() -> str:
    """Its digest: what hospitals put on their list of accepted code."""
    return hashlib.sha256(bundle_bytes()).hexdigest()


def build_bundle() -> bytes:
    """Make the bundle anew, with Flower's own builder; equal bytes for an equal release and wire schema."""
    from flwr.cli.build import build_fab_from_files

    description = {
        "build-system": {"requires": ["setuptools"], "build-backend": "setuptools.build_meta"},
        "project": {
            "name": "hospital-federation",
            "version": importlib.metadata.version("hospital-federation"),
            "description": f"Hospitals train one image model; wire schema {SCHEMA_VERSION}.",
            "license": "Apache-2.0",
            "dependencies": [],
        },
        "tool": {
            "flwr": {
                "app": {
                    "publisher": "hospital-federation",
                    "fab-include": ["BUNDLE.md"],
                    "components": {"serverapp": "server.app:app", "clientapp": "client.app:app"},
                }
            }
        },
    }
    files = {"pyproject.toml": tomli_w.dumps(description).encode(), "BUNDLE.md": _NOTE.encode()}
    return build_fab_from_files(files)[0]
