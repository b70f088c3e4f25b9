"""What training and evaluation check alike of a request: its time, its encoding, its weights."""

import math
import time

from flwr.app import Message

from client.site import Site
from common import messages
from common.config import PublicPlan
from common.errors import Refusal, RefusalCode, WireError
from common.messages import Envelope
from common.models.registry import parameter_template
from common.parameters import Parameters, from_record, parameters_sha256
from common.quantisation import Grid


def deadline_of(site: Site, request: Message) -> float:
    """Unix seconds after which an answer is worth nothing; never beyond the policy's ceiling."""
    asked = request.metadata.created_at + request.metadata.ttl
    latest = time.time() + site.config.policy.maximum_round_s
    return min(asked, latest) if math.isfinite(asked) else latest


def require_time(deadline: float, when: str) -> None:
    """Raise Refusal(LATE) when the deadline has passed; `when` says in words at what point."""
    if time.time() > deadline:
        raise Refusal(
            RefusalCode.LATE,
            f"the round's deadline passed {when}",
            fix="ask the operator for a longer server.deadline-s if it happens again",
        )


def checked_weights(request: Message, envelope: Envelope, plan: PublicPlan, *, deadline: float) -> Parameters:
    """The weights of a request, if they are the ones that plan and envelope name. Raises WireError."""
    require_time(deadline, "before it arrived")
    if (
        envelope.encoding not in messages.ENCODINGS.values()
        or envelope.masked
        or envelope.task != plan.data.task
    ):
        raise WireError("the message asks for an encoding or task that this release does not have")
    template = parameter_template(plan.model_spec)
    weights = from_record(messages.arrays_of(request.content), template)
    if parameters_sha256(weights) != envelope.key.model_hash:
        raise WireError("the global weights do not have the hash that the envelope names")
    return weights


def announced_grid(request: Message, envelope: Envelope, plan: PublicPlan) -> tuple[Grid, int] | None:
    """On which grid and with which weight the update is to travel; None for float32. Raises WireError.

    Both are numbers of the server's; whatever they are, rounding comes after the noise. Float32 may be asked
    for where the plan has a grid: small models travel so.
    """
    if envelope.encoding == messages.ENCODING_FLOAT32:
        return None
    bits = plan.wire.bits
    if bits == 32 or envelope.encoding != messages.ENCODINGS[bits]:
        raise WireError("the encoding that is asked for is not the one of the plan")
    parameters = len(parameter_template(plan.model_spec))
    return messages.grid_from_record(request.content, bits=bits, parameters=parameters)
