"""What a hospital says of itself when a run begins: facts that depend on no patient."""

import importlib.metadata

from flwr.app import Message

from client.site import Site
from common.messages import SCHEMA_VERSION, Envelope


def introduce(site: Site, request: Message, envelope: Envelope) -> Message:
    """Answer with name, enrolled count and versions."""
    facts: dict[str, str | int] = {
        "name": site.name,
        "enrolled-patients": site.config.hospital.enrolled_patients,
        "schema-version": SCHEMA_VERSION,
        "version": importlib.metadata.version("hospital-federation"),
        "flwr": importlib.metadata.version("flwr"),
    }
    return site.door.introduction(request, envelope, facts)
