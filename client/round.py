"""One round in a hospital: one function, its steps numbered, each one call.

Guarantee: a round key is charged before anything is trained and answered with one update, ever. Killed
anywhere, the hospital either sends the sealed bytes again or trains on the charge that already stands.
"""

import time
from dataclasses import dataclass

from flwr.app import ArrayRecord, Message

from client.ledger import Charge
from client.outbox import SealedAnswer
from client.policy import agree
from client.site import Site
from client.training import TrainingResult
from common import messages
from common.config import PublicPlan
from common.errors import Refusal, RefusalCode, WireError
from common.examples import Examples
from common.messages import Envelope
from common.models.registry import build_model, load_parameters, parameter_template
from common.parameters import Parameters, difference, from_record, parameters_sha256
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan
from common.privacy.randomness import RandomnessSource, ReproducibleRandomness, SecureRandomness
from common.tasks import make_task


@dataclass(frozen=True, kw_only=True)
class _Agreed:
    plan: PublicPlan
    privacy: PrivacyPlan | None
    charge: Charge


def answer_training(site: Site, request: Message, envelope: Envelope) -> Message:
    """Train one round and answer with the sealed update. Raises FederationError where the hospital refuses."""
    key, plan = envelope.key, messages.plan_from_record(request.content)
    with site.locked():
        # 1. The same question gets the same bytes.
        sealed = site.outbox.find(key)
        if sealed is None:
            # 2. Check what arrived, then the plan against policy and budget; charge and wait for the disk.
            weights = _checked_weights(request, envelope, plan)
            examples = site.images(plan).train
            agreed = agree(site, key, plan, examples)
            # 3. Train, form the difference, seal it.
            result = _train(site, plan, agreed, examples, weights, deadline=_deadline(request))
            sealed = _form_answer(site, agreed, result, weights)
            site.outbox.seal(key, sealed)
        site.ledger.mark_sealed(key, sealed.sha256)
    # 4. Through the door.
    return site.door.update(request, envelope, sealed)
