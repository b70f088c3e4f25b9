"""Every message gets an answer, and no error text leaves: only enumerated codes go through the door."""

from collections.abc import Callable

from flwr.app import Context, Message

from client.site import Site, open_site
from common import messages
from common.errors import FederationError, Refusal, RefusalCode
from common.messages import Envelope, RoundKey

Handler = Callable[[Site, Message, Envelope], Message]
_UNKNOWN = Envelope(key=RoundKey(run_id="", attempt=0, round_number=0, model_hash=""))


def answered(handler: Handler, request: Message, context: Context) -> Message:
    """Let `handler` answer; turn whatever goes wrong into a refusal and keep the details here."""
    site, envelope = None, _UNKNOWN
    try:
        site = open_site(context)
        envelope = Envelope.from_record(request.content)
        return handler(site, request, envelope)
    except Exception as error:
        if site is None:
            return messages.refusal(request, envelope, _code(error))
        site.log_locally(error)
        return site.door.refusal(request, envelope, _code(error))


def _code(error: Exception) -> RefusalCode:
    if isinstance(error, Refusal):
        return error.code
    return error.refusal if isinstance(error, FederationError) else RefusalCode.INTERNAL
