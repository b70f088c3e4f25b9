"""One round in a hospital: one function, its steps numbered, each one call.

Guarantee: a round key is charged before anything is trained and answered with one update, ever. Killed
anywhere, the hospital either sends the sealed bytes again or trains on the charge that already stands.
"""

import time

from flwr.app import Message

from client.approval.approvals import await_release
from client.device import reproducible_kernels, resolve_device
from client.fault_points import reached
from client.features import on_features
from client.images.dataset import HospitalImages
from client.ledger.receipts import issued, require_current
from client.ledger.records import TRAINING, Charge
from client.limits import Behind
from client.outbox import SealedAnswer
from client.policy import TrainingRequest, agree, planned, require_allowed, require_patients
from client.release import encoded
from client.requests import announced_grid, checked_weights, deadline_of, require_time
from client.self_test.start import require_self_test
from client.site import Site
from client.training.out_of_memory import explained_memory
from client.training.plain import TrainingResult, train
from client.training.private import train_privately
from common import messages
from common.config import PublicPlan
from common.errors import Refusal, RefusalCode
from common.hospital_config import HospitalConfig
from common.messages import Envelope, RoundKey
from common.models.registry import build_model, load_parameters
from common.parameters import Parameters, difference
from common.preprocessing import Preprocessing
from common.privacy.plan import PrivacyPlan, Unit
from common.privacy.randomness import RandomnessSource, ReproducibleRandomness, SecureRandomness
from common.quantisation import Arrays
from common.tasks import task_of


def train_round(site: Site, request: Message, envelope: Envelope) -> Message:
    """Answer a training request. Raises FederationError where the hospital refuses."""
    key, deadline = envelope.key, deadline_of(site, request)
    with site.locked():
        # 1. Nothing leaves on an older copy of the ledger; the same question gets the same bytes.
        require_current(site, request)
        sealed = site.outbox.find(key)
        if sealed is None:
            # 2. Refuse what the policy never allows and what nobody has approved; nothing private is read.
            plan = messages.plan_from_record(request.content)
            require_allowed(site.config, _asked(plan, key, unit=plan.data.unit))
            approved_epsilon = _approved_epsilon(site, key, plan)
            # 3. Check what arrived and what is here.
            weights = checked_weights(request, envelope, plan, deadline=deadline)
            grid = announced_grid(request, envelope, plan)
            images = _checked_images(site, plan)
            # 4. Agree under the hospital's policy; see that differential privacy is really on.
            privacy = _agreed(site, key, plan, images, approved_epsilon)
            if privacy is not None:
                require_self_test(site, plan, privacy, images, weights=weights)
            # 5. Charge the ledger and wait for the disk.
            charge = _charged(site, key, plan, privacy, images, deadline=deadline)
            # 6. Train, form the difference, round it on the round's grid, seal it.
            with reproducible_kernels(plan.federation.reproducible):
                result = _trained(site, key, plan, privacy, images, weights, deadline=deadline)
            delta = difference(result.parameters, weights)
            rounded = encoded(delta, grid, _randomness(site, plan), round_number=key.round_number)
            sealed = _formed(site, plan, charge, result, rounded)
            reached("trained")
            site.outbox.seal(key, sealed)
            reached("sealed-before-mark")
        # 7. Note in the ledger what was sealed.
        site.ledger.mark_sealed(key, sealed.digest)
        receipt = issued(site)
        reached("marked")
    # 8. Where every update waits for a person, wait, with nothing locked.
    if site.config.policy.approval == "update":
        await_release(site.approvals, key, sealed, deadline=deadline)
    # 9. Through the door.
    reached("before-send")
    return site.door.update(request, envelope, sealed, ledger_receipt=receipt)


def _approved_epsilon(site: Site, key: RoundKey, plan: PublicPlan) -> float | None:
    """What a person allows this run to cost, None where nobody needs to be asked or nothing is claimed."""
    if site.config.policy.approval == "automatic":
        return None
    return site.approvals.require(key, plan).epsilon


def _checked_images(site: Site, plan: PublicPlan) -> HospitalImages:
    images = site.images(plan)
    require_patients(plan, images.unit)
    return images


def _agreed(
    site: Site, key: RoundKey, plan: PublicPlan, images: HospitalImages, approved_epsilon: float | None
) -> PrivacyPlan | None:
    """The plan of this round: as it was charged where it was, else agreed under the policy."""
    config, ledger = site.config, site.ledger
    asked = _asked(plan, key, unit=images.unit)
    standing = ledger.find(key)
    if standing is not None and standing.sealed_sha256 is not None:
        raise Refusal(
            RefusalCode.CONFLICT,
            f"round {key.round_number} was answered, and the sealed answer is gone",
            why="a second, different answer on the same charge would double what is learned",
            fix="let the server open a new attempt, which is charged",
        )
    if standing is not None and standing.event is not None:
        charged = planned(config, asked, standing.event.noise_multiplier)
        if charged.digest() != standing.plan_digest:
            raise Refusal(
                RefusalCode.CONFLICT,
                f"round {key.round_number} was charged for another plan",
                why="what is trained on a charge must be what the ledger says",
                fix="let the server open a new attempt, which is charged",
            )
        return charged
    of_run = [c for c in ledger.charges() if c.key.run_id == key.run_id and c.purpose == TRAINING]
    begun = next((charge for charge in of_run if charge.event is not None), None)
    if begun is not None:
        _require_plan_of_run(config, asked, begun)
    histories = ledger.histories(
        ledger.cohort(images.train.unit_ids),
        rehearsed_run=None if plan.claims_privacy else key.run_id,
        composition=config.policy.composition,
        run_id=key.run_id,
    )
    run_events = [charge.event for charge in of_run if charge.event is not None]
    try:
        return agree(
            config,
            asked,
            Behind(histories=histories, run_events=run_events),
            earlier_noise_multiplier=begun.event.noise_multiplier if begun and begun.event else None,
            approved_epsilon=approved_epsilon,
        )
    except Refusal as refusal:
        if refusal.code is RefusalCode.APPROVAL:
            raise site.approvals.beyond(key, plan, refusal) from None
        raise


def _require_plan_of_run(config: HospitalConfig, asked: TrainingRequest, begun: Charge) -> None:
    """Refuse a request whose numbers are not those of the run's first charge, whatever its attempt.

    The budget adds up rounds whose plan does not depend on what came out of them. A server that chose a plan
    after seeing earlier answers could exceed delta; it may only stop early.
    """
    if begun.event is None or not asked.private:
        return
    plan = planned(config, asked, begun.event.noise_multiplier)
    numbers = {
        "sampling-rate": (plan.sampling_rate, begun.event.sampling_rate),
        "local-steps": (plan.steps, begun.event.steps),
        "l2-clip-norm": (plan.l2_clip_norm, begun.l2_clip_norm),
        "unit": (plan.unit, begun.unit),
    }
    changed = [f"{name}: {was} before, now {now}" for name, (now, was) in numbers.items() if now != was]
    if not changed and plan.digest() != begun.plan_digest:
        changed = ["max-images-per-patient of the run, or hospital.enrolled-patients here"]
    if changed:
        raise Refusal(
            RefusalCode.CONFLICT,
            "the plan of a run that has begun was changed",
            why=f"{'; '.join(changed)}; a plan chosen after earlier answers is not what the budget adds up",
            fix="go on with the plan of the first round, or let the server open a new run",
        )


def _charged(
    site: Site,
    key: RoundKey,
    plan: PublicPlan,
    privacy: PrivacyPlan | None,
    images: HospitalImages,
    *,
    deadline: float,
) -> Charge:
    """Charge the round; a charge that already stands is trained on, not repeated."""
    require_time(deadline, "while the images were read: nothing is paid for an answer that comes too late")
    reached("before-charge")
    charge = site.ledger.charge(
        key,
        event=privacy.event() if privacy else None,
        cohort=site.ledger.cohort(images.train.unit_ids),
        delta=site.config.delta,
        unit=images.unit,
        l2_clip_norm=privacy.l2_clip_norm if privacy else None,
        claims_privacy=plan.claims_privacy,
        limit=site.config.policy.epsilon,
        composition=site.config.policy.composition,
        recipient=site.recipient,
        plan_digest=privacy.digest() if privacy else "",
    )
    issued(site)  # no answer is formed whose charge no receipt holds
    reached("charged")
    return charge


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
    task = task_of(plan)
    preprocessing = Preprocessing(image_size=plan.data.image_size, channels=plan.data.channels)
    randomness = _randomness(site, plan)
    device = resolve_device(site.config.site.device)
    with explained_memory(physical_batch_size=plan.training.physical_batch_size, device=device):
        trainable = on_features(
            model,
            spec=plan.model_spec,
            examples=images.train,
            preprocessing=preprocessing,
            device=device,
            changing=plan.augmentation.is_on,
            stop=lambda: time.time() > deadline,
        )
        if privacy is not None:
            return train_privately(
                model=trainable.model,
                task=task,
                examples=trainable.examples,
                preprocessing=trainable.preprocessing,
                plan=privacy,
                training=plan.training,
                round_number=key.round_number,
                num_rounds=plan.federation.rounds,
                randomness=randomness,
                device=device,
                augmentation=plan.augmentation,
                stop=lambda: time.time() > deadline,
            )
        return train(
            model=trainable.model,
            task=task,
            examples=trainable.examples,
            preprocessing=trainable.preprocessing,
            training=plan.training,
            local_steps=plan.privacy.local_steps,
            round_number=key.round_number,
            num_rounds=plan.federation.rounds,
            randomness=randomness,
            device=device,
            augmentation=plan.augmentation,
            stop=lambda: time.time() > deadline,
        )


def _randomness(site: Site, plan: PublicPlan) -> RandomnessSource:
    if plan.federation.reproducible:
        return ReproducibleRandomness(plan.federation.seed, site.name)
    return SecureRandomness()


def _formed(
    site: Site, plan: PublicPlan, charge: Charge, result: TrainingResult, delta: Arrays
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
    return SealedAnswer(delta=delta, metrics=metrics)


def _asked(plan: PublicPlan, key: RoundKey, *, unit: Unit) -> TrainingRequest:
    return TrainingRequest.of(plan, round_number=key.round_number, unit=unit)
