"""The end of a run: the hospital keeps the finished model, its description and its card, and signs."""

import json

from flwr.app import ConfigRecord, Message

from client.certificate import write_certificate
from client.certificate_check import CERTIFICATE
from client.site import Site
from common import messages
from common.config import ModelSpec
from common.errors import ConfigError, FederationError, PolicyError, WireError
from common.files import write_bytes_atomically, write_manifest
from common.messages import Envelope
from common.models.registry import parameter_template
from common.parameters import from_record, parameters_sha256, write_safetensors
from common.settings import parse

_LARGEST_TEXT = 1_000_000


def keep_model(site: Site, request: Message, envelope: Envelope) -> Message:
    """Check the model against its own description and hash, store it under `models/<run>`, send a receipt.

    The receipt brings the hospital's signed certificate; should that fail, it goes without one.
    """
    run_id = envelope.key.run_id
    if not any(charge.key.run_id == run_id for charge in site.ledger.charges()):
        raise PolicyError(
            "a model of a run in which this hospital did not train is not kept",
            why="anybody who reaches the hospital could otherwise fill its disk or replace its models",
            fix="nothing, if it took no part in that run; if it did, `flower-client ledger verify` looks "
            "whether charges are missing from the ledger",
        )
    record = request.content.get(messages.MODEL)
    if not isinstance(record, ConfigRecord):
        raise WireError("the closing message describes no model")
    description, card, announced = (str(record.get(key, "")) for key in ("json", "card", "sha256"))
    if max(len(description), len(card)) > _LARGEST_TEXT:
        raise WireError("the model's description is too long")
    spec = _spec(description)
    weights = from_record(messages.arrays_of(request.content), parameter_template(spec))
    if not announced == envelope.key.model_hash == parameters_sha256(weights):
        raise WireError("the final model does not have the hash that was announced")
    folder = site.models_folder / run_id
    for place in (site.models_folder, folder):
        place.mkdir(mode=0o700, exist_ok=True)  # `parents` of mkdir would have the default mode
    write_safetensors(folder / "model.safetensors", weights, mode=0o600)
    write_bytes_atomically(folder / "model.json", description.encode(), mode=0o600)
    write_bytes_atomically(folder / "MODEL_CARD.md", card.encode(), mode=0o600)
    certificate = _certificate(site, run_id, spec, announced, description)
    written = [CERTIFICATE] if certificate else []
    write_manifest(folder, ["model.safetensors", "model.json", "MODEL_CARD.md", *written], mode=0o600)
    return site.door.receipt(request, envelope, announced, certificate=certificate)


def _certificate(site: Site, run_id: str, spec: ModelSpec, model_sha256: str, description: str) -> str:
    try:
        with site.locked():  # of two processes one makes the key
            return write_certificate(
                site, run_id=run_id, spec=spec, model_sha256=model_sha256, description=json.loads(description)
            )
    except (FederationError, OSError) as error:
        site.log_locally(error)
        return ""


def _spec(description: str) -> ModelSpec:
    try:
        return parse(ModelSpec, json.loads(description)["spec"], source="model.json")
    except (ValueError, KeyError, TypeError, ConfigError):
        raise WireError("the model's description names no model that this side knows") from None
