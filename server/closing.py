"""The closing exchange: every hospital gets the final model, its description and its card.

A receipt may bring the hospital's release certificate; one that holds is kept in the run folder.
"""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from flwr.app import ConfigRecord, Message, RecordDict

from common import messages
from common.errors import ConfigError, WireError
from common.files import write_bytes_atomically
from common.messages import Envelope
from common.parameters import into_record, parameters_sha256
from common.statements import LARGEST_STATEMENT, RELEASE_CERTIFICATE, verify_statement
from server.exchange import receive, send
from server.federation import Federation
from server.hospitals import Hospital
from server.run_folder import CERTIFICATES, MODEL_CARD, MODEL_DESCRIPTION
from server.run_state import RunState

_MOST_NAMED = 100
"""Hospitals of a run up to which each gets the entries of all others too."""

log = logging.getLogger(__name__)


def hand_out_model(federation: Federation, state: RunState) -> dict[str, bool]:
    """Send the model to all connected hospitals; says, by name, who confirmed it. Silence is no failure."""
    config, folder = federation.config, federation.folder
    model = state.result(config)
    sha256 = parameters_sha256(model)
    envelope = federation.envelope(state, model_sha256=sha256)
    arrays = into_record(model)
    description, card = _text(folder.path / MODEL_DESCRIPTION), _text(folder.path / MODEL_CARD)
    federation.roster.greet(federation.envelope(state))
    hospitals = federation.roster.connected()
    contents = {
        hospital.node_id: RecordDict(
            {
                messages.ENVELOPE: envelope.to_record(),
                messages.ARRAYS: arrays,
                messages.MODEL: ConfigRecord({"json": text, "sha256": sha256, "card": card}),
            }
        )
        for hospital, text in zip(hospitals, descriptions_for(hospitals, description), strict=True)
    }
    timeout_s = min(config.server.deadline_s, config.server.patience_s)
    sent = send(federation.grid, contents, message_type=messages.CLOSING, group="closing", ttl_s=timeout_s)
    by_message = {sent[h.node_id].message_id: h for h in hospitals if h.node_id in sent}
    del arrays, contents
    received = {hospital.name: False for hospital in hospitals}
    for reply in receive(
        federation.grid, by_message, timeout_s=timeout_s, stop=lambda: folder.stop_requested
    ):
        hospital = by_message[reply.metadata.reply_to_message_id]
        received[hospital.name] = _is_receipt(reply, envelope, hospital.node_id, sha256)
        if received[hospital.name]:
            _keep_certificate(federation, reply, hospital, sha256)
    for name in sorted(name for name, confirmed in received.items() if not confirmed):
        log.warning("%s did not confirm the final model; `flower-server export` gives it the file", name)
    return received


def descriptions_for(hospitals: Sequence[Hospital], description: str) -> Iterator[str]:
    """The description that each hospital gets: in a large run without the other hospitals' costs."""
    if len(hospitals) <= _MOST_NAMED or not description:
        yield from [description] * len(hospitals)
        return
    content: dict[str, Any] = json.loads(description)
    costs = content["privacy"].get("hospitals", {})
    for hospital in hospitals:
        own = {name: costs[name] for name in (hospital.name,) if name in costs}
        privacy = content["privacy"] | ({"hospitals": own} if costs else {})
        yield json.dumps(content | {"privacy": privacy}, indent=2)


def _is_receipt(reply: Message, envelope: Envelope, node_id: int, sha256: str) -> bool:
    if reply.has_error() or reply.metadata.src_node_id != node_id:
        return False
    try:
        if Envelope.from_record(reply.content) != envelope:
            return False
    except WireError:
        return False
    receipt = reply.content.get(messages.RECEIPT)
    return isinstance(receipt, ConfigRecord) and receipt.get("sha256") == sha256


def _keep_certificate(federation: Federation, reply: Message, hospital: Hospital, sha256: str) -> None:
    """Store the hospital's certificate; a bad one is warned about, and the receipt counts all the same."""
    text = reply.content[messages.RECEIPT].get("certificate", "")
    if text == "":
        return
    problem = _certificate_problem(federation, text, hospital, run_id=_run_of(reply), sha256=sha256)
    if problem is not None:
        log.warning("the certificate of %s is not kept: %s", hospital.name, problem)
        return
    path = federation.folder.path / CERTIFICATES / f"{hospital.name}.json"
    write_bytes_atomically(path, str(text).encode())


def _run_of(reply: Message) -> str:
    return Envelope.from_record(reply.content).key.run_id


def _certificate_problem(
    federation: Federation, text: object, hospital: Hospital, *, run_id: str, sha256: str
) -> str | None:
    """What is wrong with a certificate, in words of this side only; None when it may be kept."""
    if not isinstance(text, str) or len(text.encode()) > LARGEST_STATEMENT:
        return "it is no text, or too long"
    try:
        statement = verify_statement(text)
    except (ConfigError, RecursionError):
        return "its signature does not hold"
    if statement.kind != RELEASE_CERTIFICATE:
        return "it is a statement of another kind"
    content = statement.content
    model = content.get("model")
    if (content.get("hospital"), content.get("run_id")) != (hospital.name, run_id):
        return "it is for another hospital or run"
    if not isinstance(model, dict) or model.get("sha256") != sha256:
        return "it is for another model"
    enrolled_as = getattr(federation.grid, "enrolled_as", None)  # simulations have no roster
    entry = enrolled_as(hospital.node_id) if federation.config.runtime.roster and enrolled_as else None
    if entry is not None and entry.fingerprint != statement.fingerprint:
        return "it is signed with another key than the roster's"
    return None


def _text(path: Path) -> str:
    return path.read_text() if path.is_file() else ""
