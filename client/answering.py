"""Every message gets an answer, and no error text leaves: only enumerated codes go through the door."""

import contextlib
from collections.abc import Callable

from flwr.app import Context, Message

from client.hospital_log import code_of
from client.site import Site, open_site
from common import messages
from common.errors import WireError
from common.messages import Envelope, RoundKey

Handler = Callable[[Site, Message, Envelope], Message]
_UNKNOWN = Envelope(key=RoundKey(run_id="", attempt=0, round_number=0, model_hash=""))


def answered(handler: Handler, request: Message, context: Context) -> Message:
    """Let `handler` answer; turn whatever goes wrong into a refusal and keep the details here."""
    site, envelope = None, _UNKNOWN
    try:
        with contextlib.suppress(WireError):
            envelope = Envelope.from_record(request.content)
        site = open_site(context)
        envelope = Envelope.from_record(request.content)
        return handler(site, request, envelope)
    except Exception as error:
        return _refused(site, request, envelope, error)


def _refused(site: Site | None, request: Message, envelope: Envelope, error: Exception) -> Message:
    code = code_of(error)
    if site is not None:
        # A full disk must not turn into an exception: Flower would send its words to the server.
        with contextlib.suppress(OSError):
            site.log_locally(error)
        with contextlib.suppress(OSError):
            return site.door.refusal(request, envelope, code)
    return messages.refusal(request, envelope, code)
