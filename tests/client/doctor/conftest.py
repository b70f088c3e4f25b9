"""The small pictures and manifests of the reader's tests."""

from tests.client.images.conftest import draw, manifest, pixels

__all__ = ["draw", "manifest", "pixels"]
