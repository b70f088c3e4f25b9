"""One round in a hospital: one function, its steps numbered, each one call.

Guarantee: a round key is charged before anything is trained and answered with one update, ever. Killed
anywhere, the hospital either sends the sealed bytes again or trains on the charge that already stands.
"""

import math
import time

from flwr.app import Message

from client.device import reproducible_kernels, resolve_device
from client.images.dataset import HospitalImages
from client.ledger_records import Charge
from client.out_of_memory import explained_memory
from client.outbox import SealedAnswer
from client.policy import TrainingRequest, agree, planned, require_allowed, require_patients
from client.private_training import train_privately
from client.site import Site
from client.training import TrainingResult, train
from common import messages
from common.config import PublicPlan
from common.errors import Refusal, RefusalCode, WireError
from common.messages import Envelope, RoundKey
from common.models.registry import build_model, load_parameters, parameter_template
from common.parameters import Parameters, difference, from_record, parameters_sha256
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan, Unit
from common.privacy.randomness import RandomnessSource, ReproducibleRandomness, SecureRandomness
from common.tasks import make_task


def train_round(site: Site, request: Message, envelope: Envelope) -> Message:
    """Answer a training request. Raises FederationError where the hospital refuses."""
    key, deadline = envelope.key, _deadline(site, request)
    with site.locked():
        # 1. The same question gets the same bytes.
        sealed = site.outbox.find(key)
        if sealed is None:
            # 2. Refuse what the policy never allows; check what arrived and what is here.
            plan = messages.plan_from_record(request.content)
            require_allowed(site.config, _asked(plan, key, unit=plan.data.unit))
            weights = _checked_weights(request, envelope, plan, deadline=deadline)
            images = _checked_images(site, plan)
            # 3. Agree under the hospital's policy; charge the ledger and wait for the disk.
            privacy, charge = _charged(site, key, plan, images, deadline=deadline)
            # 4. Train, form the difference, seal it.
            with reproducible_kernels(plan.federation.reproducible):
                result = _trained(site, key, plan, privacy, images, weights, deadline=deadline)
            sealed = _formed(site, plan, charge, result, weights)
            site.outbox.seal(key, sealed)
        site.ledger.mark_sealed(key, sealed.sha256)
    # 5. Through the door.
    return site.door.update(request, envelope, sealed)


def _checked_weights(
    request: Message, envelope: Envelope, plan: PublicPlan, *, deadline: float
) -> Parameters:
    _require_time(deadline, "before it arrived")
    if envelope.encoding != messages.ENCODING_FLOAT32 or envelope.masked or envelope.task != plan.data.task:
        raise WireError("the message asks for an encoding or task that this release does not have")
    template = parameter_template(plan.model_spec)
    weights = from_record(messages.arrays_of(request.content), template)
    if parameters_sha256(weights) != envelope.key.model_hash:
        raise WireError("the global weights do not have the hash that the envelope names")
    return weights


def _checked_images(site: Site, plan: PublicPlan) -> HospitalImages:
    images = site.images(plan)
    require_patients(plan, images.unit)
    return images


def _charged(
    site: Site, key: RoundKey, plan: PublicPlan, images: HospitalImages, *, deadline: float
) -> tuple[PrivacyPlan | None, Charge]:
    """Agree on this round's plan and charge it; a charge that already stands is trained on, not repeated."""
    config, ledger = site.config, site.ledger
    asked = _asked(plan, key, unit=images.unit)
    cohort = ledger.cohort(images.train.unit_ids)
    standing = ledger.find(key)
    if standing is not None and standing.sealed_sha256 is not None:
        raise Refusal(
            RefusalCode.CONFLICT,
            f"round {key.round_number} was answered, and the sealed answer is gone",
            why="a second, different answer on the same charge would double what is learned",
            fix="let the server open a new attempt, which is charged",
        )
    if standing is not None and standing.event is not None:
        privacy: PrivacyPlan | None = planned(config, asked, standing.event.noise_multiplier)
        if privacy is not None and privacy.digest() != standing.plan_digest:
            raise Refusal(
                RefusalCode.CONFLICT,
                f"round {key.round_number} was charged for another plan",
                why="what is trained on a charge must be what the ledger says",
                fix="let the server open a new attempt, which is charged",
            )
    else:
        rehearsed = None if plan.claims_privacy else key.run_id
        privacy = agree(
            config,
            asked,
            histories=ledger.histories(cohort, rehearsed_run=rehearsed),
            earlier_noise_multiplier=ledger.noise_multiplier_of(key.run_id),
        )
    _require_time(deadline, "while the images were read: nothing is paid for an answer that comes too late")
    charge = ledger.charge(
        key,
        event=privacy.event() if privacy else None,
        cohort=cohort,
        delta=config.delta,
        unit=images.unit,
        l2_clip_norm=privacy.l2_clip_norm if privacy else None,
        claims_privacy=plan.claims_privacy,
        limit=config.policy.epsilon,
        plan_digest=privacy.digest() if privacy else "",
    )
    return privacy, charge


def _trained(
    site: Site,
    key: RoundKey,
    plan: PublicPlan,
    privacy: PrivacyPlan | None,
    images: HospitalImages,
    weights: Parameters,
    *,
    deadline: float,
) -> TrainingResult:
    model = build_model(plan.model_spec)
    load_parameters(model, weights)
    task = make_task(plan.data.task, plan.data.classes)
    preprocessing = Preprocessing(image_size=plan.data.image_size, channels=plan.data.channels)
    randomness: RandomnessSource = SecureRandomness()
    if plan.federation.reproducible:
        randomness = ReproducibleRandomness(plan.federation.seed, site.name)
    device = resolve_device(site.config.site.device)
    with explained_memory(physical_batch_size=plan.training.physical_batch_size, device=device):
        if privacy is not None:
            return train_privately(
                model=model,
                task=task,
                examples=images.train,
                preprocessing=preprocessing,
                plan=privacy,
                training=plan.training,
                round_number=key.round_number,
                num_rounds=plan.federation.rounds,
                randomness=randomness,
                device=device,
                stop=lambda: time.time() > deadline,
            )
        return train(
            model=model,
            task=task,
            examples=images.train,
            preprocessing=preprocessing,
            training=plan.training,
            local_steps=plan.privacy.local_steps,
            round_number=key.round_number,
            num_rounds=plan.federation.rounds,
            randomness=randomness,
            device=device,
            stop=lambda: time.time() > deadline,
        )


def _formed(
    site: Site, plan: PublicPlan, charge: Charge, result: TrainingResult, weights: Parameters
) -> SealedAnswer:
    """The update and the scalars that go with it; every number but the clock is the plan's own."""
    metrics: dict[str, float | int] = {
        messages.NUM_EXAMPLES: site.config.hospital.enrolled_patients,
        messages.TRAINING_STARTED: result.started_at,
        messages.TRAINING_ENDED: result.ended_at,
    }
    if plan.claims_privacy and charge.event is not None and charge.epsilon is not None:
        metrics |= {
            messages.NOISE_MULTIPLIER: charge.event.noise_multiplier,
            messages.STEPS: charge.event.steps,
            messages.EPSILON: charge.epsilon,
            messages.DELTA: charge.delta,
        }
    return SealedAnswer(delta=difference(result.parameters, weights), metrics=metrics)


def _require_time(deadline: float, when: str) -> None:
    if time.time() > deadline:
        raise Refusal(
            RefusalCode.LATE,
            f"the round's deadline passed {when}",
            fix="ask the operator for a longer server.deadline-s if it happens again",
        )


def _asked(plan: PublicPlan, key: RoundKey, *, unit: Unit) -> TrainingRequest:
    return TrainingRequest.of(plan, round_number=key.round_number, unit=unit)


def _deadline(site: Site, request: Message) -> float:
    """Unix seconds after which an answer is worth nothing; never beyond the policy's ceiling."""
    asked = request.metadata.created_at + request.metadata.ttl
    latest = time.time() + site.config.policy.maximum_round_s
    return min(asked, latest) if math.isfinite(asked) else latest
