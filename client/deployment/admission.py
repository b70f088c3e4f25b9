"""What is decided before a message is looked at: is its code accepted, does this hospital take part."""

import hashlib
from pathlib import Path

from flwr.app import Context, Message

from client.answering import answered
from client.provisioning.code_list import is_accepted
from client.provisioning.standing import has_left, is_paused
from client.site import Site
from common import messages
from common.errors import ConfigError, Refusal, RefusalCode, printable
from common.messages import Envelope


def admitted(
    state: Path, bundle: bytes, request: Message, context: Context, *, name: str = ""
) -> Message | None:
    """None where the message may go on to the ClientApp; otherwise the refusal, which is in the audit log."""
    digest = hashlib.sha256(bundle).hexdigest()
    if not _is_on_the_list(state, digest):
        return _refused(
            request,
            context,
            Refusal(
                RefusalCode.CODE,
                f"the run names app bundle {digest}, which is not accepted here",
                why=f"the server calls it {printable(name) or 'nothing'} (publisher/name version); only "
                "releases on this hospital's own list take part",
                fix=f"compare it with the operator's by telephone; then flower-client code accept {digest}",
            ),
        )
    if has_left(state):
        return _refused(request, context, Refusal(RefusalCode.LEFT, "this hospital has left the federation"))
    # A finished model of a run in which this hospital has trained is kept also while it pauses.
    if is_paused(state) and request.metadata.message_type != messages.CLOSING:
        return _refused(
            request,
            context,
            Refusal(RefusalCode.PAUSED, "this hospital pauses", fix="flower-client pause --off"),
        )
    return None


def _is_on_the_list(state: Path, digest: str) -> bool:
    try:
        return is_accepted(state, digest)
    except (ConfigError, OSError):  # a list that cannot be read accepts nothing
        return False


def _refused(request: Message, context: Context, refusal: Refusal) -> Message:
    """Through the door like every answer: a line in audit.jsonl, the words in the hospital's own log only."""

    def refuse(_site: Site, _request: Message, _envelope: Envelope) -> Message:
        raise refusal

    return answered(refuse, request, context)
