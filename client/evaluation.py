"""Scoring a model on a hospital's validation patients: only noised counts leave, charged to those patients.

Guarantee: whatever leaves is one Gaussian mechanism over patients (`common.evaluation`), charged to the
validation patients before anything is counted and answered with the same bytes for ever. A hospital without
validation patients answers with noise alone: whether it has any is private.
"""

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt
import torch
from flwr.app import Message
from torch import nn

from client.approval.approvals import await_release
from client.device import reproducible_kernels, resolve_device
from client.fault_points import reached
from client.images.dataset import HospitalImages
from client.ledger.receipts import issued, require_current
from client.ledger.records import EVALUATION, Charge
from client.limits import Behind, first_broken, limit_error, limits_of
from client.outbox import SealedAnswer
from client.policy import TrainingRequest, require_allowed, require_patients
from client.requests import checked_weights, deadline_of, require_time
from client.site import Site
from client.training.batches import input_tensor, rows_per_chunk
from client.training.out_of_memory import explained_memory
from client.training.row_places import place_matters
from common import messages
from common.config import PublicPlan
from common.errors import BudgetError, Refusal, RefusalCode
from common.evaluation import (
    CountPlan,
    count_patients,
    noised,
    patient_labels,
    patient_means,
    patient_rows,
)
from common.examples import Examples
from common.hospital_config import HospitalConfig
from common.messages import Envelope, RoundKey
from common.models.registry import build_model, load_parameters
from common.parameters import Parameters
from common.preprocessing import Preprocessing
from common.privacy.accountant import running_epsilon
from common.privacy.calibration import solve_noise_multiplier
from common.privacy.plan import PrivacyEvent
from common.privacy.randomness import RandomnessSource, ReproducibleRandomness, SecureRandomness
from common.tasks import Task, task_of


def evaluate_model(site: Site, request: Message, envelope: Envelope) -> Message:
    """Answer an evaluation request. Raises FederationError where the hospital refuses."""
    key, deadline, config = envelope.key, deadline_of(site, request), site.config
    with site.locked():
        # 1. Nothing leaves on an older copy of the ledger; the same question gets the same bytes.
        require_current(site, request)
        sealed = site.outbox.find(key, purpose=EVALUATION)
        if sealed is None:
            # 2. Refuse what policy and release settings never allow and what nobody has approved.
            plan = messages.plan_from_record(request.content)
            asked = TrainingRequest.of(plan, round_number=key.round_number, unit=plan.data.unit)
            require_allowed(config, asked)
            others = _require_released(site, key)
            earlier = [charge.event for charge in others if charge.event is not None]
            approved_epsilon = None
            if config.policy.approval != "automatic":
                approval = site.approvals.require_evaluation(key, plan, earlier=len(others))
                approved_epsilon = approval.evaluation_epsilon
            # 3. Check what arrived and what is here.
            weights = checked_weights(request, envelope, plan, deadline=deadline)
            images = site.images(plan)
            require_patients(plan, images.unit)
            # 4. Charge the validation patients and wait for the disk.
            require_time(deadline, "while the images were read")
            event = _agreed_event(site, key, plan, Behind(run_events=earlier), approved_epsilon)
            reached("before-charge")
            charge = _charged(site, key, plan, event, images)
            reached("charged")
            issued(site)  # no answer is formed whose charge no receipt holds
            # 5. Count, add the noise, seal.
            counts = _counts(site, key, plan, charge, images.validation, weights, deadline=deadline)
            sealed = SealedAnswer(delta={}, counts=counts, metrics=_stated(config, plan, charge, earlier))
            reached("trained")
            site.outbox.seal(key, sealed, purpose=EVALUATION)
            reached("sealed-before-mark")
        site.ledger.mark_sealed(key, sealed.digest, purpose=EVALUATION)
        receipt = issued(site)
        reached("marked")
    # 6. Where every answer waits for a person, wait, with nothing locked.
    if config.policy.approval == "update":
        await_release(site.approvals, key, sealed, deadline=deadline, purpose=EVALUATION)
    # 7. Through the door.
    reached("before-send")
    return site.door.evaluation(request, envelope, sealed.counts, sealed.metrics, ledger_receipt=receipt)


def count_plan(config: HospitalConfig, plan: PublicPlan) -> CountPlan:
    """Which counts this hospital releases of what a run asks."""
    return CountPlan.of(
        config.release.metrics,
        classes=len(plan.data.classes),
        score_bins=plan.evaluation.score_bins,
        task=plan.data.task,
    )


def noise_multiplier_for(config: HospitalConfig) -> float:
    """The least noise with which one evaluation costs what the hospital allows for it. Raises Refusal."""
    cost = min(config.release.epsilon, config.policy.epsilon)
    try:
        return solve_noise_multiplier(
            histories=[()],
            sampling_rate=1.0,
            steps=1,
            epsilon=cost,
            delta=config.delta,
            minimum=config.policy.minimum_noise_multiplier,
            maximum=config.policy.maximum_noise_multiplier,
        )
    except BudgetError as error:
        raise Refusal(
            RefusalCode.METRICS,
            f"an evaluation at epsilon {cost:g} needs more noise than policy.maximum-noise-multiplier",
            why=error.why,
            fix="raise release.epsilon, or set release.metrics = [] to release none",
        ) from None


def _require_released(site: Site, key: RoundKey) -> list[Charge]:
    """The charges of this run's other evaluations; Refusal(METRICS) where no (further) one may leave."""
    release = site.config.release
    if not release.metrics:
        raise Refusal(
            RefusalCode.METRICS,
            "no metric leaves this hospital",
            why="release.metrics is empty",
            fix="name confusion, scores or both in release.metrics to take part in evaluations",
        )
    charges = [c for c in site.ledger.charges() if c.key.run_id == key.run_id and c.purpose == EVALUATION]
    others = [charge for charge in charges if charge.key != key]
    if len(others) >= release.maximum_per_run:
        raise Refusal(
            RefusalCode.METRICS,
            f"this run has had {len(others)} evaluations",
            why=f"release.maximum-per-run is {release.maximum_per_run}",
            fix="raise that setting if validation patients shall pay for more",
        )
    return others


def _agreed_event(
    site: Site, key: RoundKey, plan: PublicPlan, behind: Behind, approved_epsilon: float | None
) -> PrivacyEvent | None:
    """What this evaluation does: as it was charged where it was, else the least noise that is allowed."""
    config = site.config
    standing = site.ledger.find(key, purpose=EVALUATION)
    if standing is not None and standing.sealed_sha256 is not None:
        raise Refusal(
            RefusalCode.CONFLICT,
            f"the evaluation after round {key.round_number} was answered, and the sealed answer is gone",
            why="a second, different answer on the same charge would double what is learned",
            fix="let the server open a new attempt, which is charged",
        )
    if standing is not None:
        return standing.event
    if not plan.federation.private:
        return None
    event = PrivacyEvent(sampling_rate=1.0, noise_multiplier=noise_multiplier_for(config), steps=1)
    limits = list(limits_of(config, behind, approved_epsilon=approved_epsilon))
    if (broken := first_broken(limits, event, delta=config.delta)) is not None:
        what = f"one more evaluation would take validation patients above epsilon {broken.epsilon:g}"
        error = limit_error(broken, what, event, delta=config.delta)
        raise site.approvals.beyond(key, plan, error) if isinstance(error, Refusal) else error
    return event


def _charged(
    site: Site, key: RoundKey, plan: PublicPlan, event: PrivacyEvent | None, images: HospitalImages
) -> Charge:
    """Charge this evaluation to the validation patients; a charge that already stands is not repeated."""
    return site.ledger.charge(
        key,
        event=event,
        cohort=site.ledger.cohort(images.validation.unit_ids),
        delta=site.config.delta,
        unit=images.unit,
        claims_privacy=plan.claims_privacy,
        limit=site.config.policy.epsilon,
        composition=site.config.policy.composition,
        purpose=EVALUATION,
        recipient=site.recipient,
    )


def _counts(
    site: Site,
    key: RoundKey,
    plan: PublicPlan,
    charge: Charge,
    validation: Examples,
    weights: Parameters,
    *,
    deadline: float,
) -> dict[str, list[float]]:
    """Score the validation patients, count them, add the charged noise."""
    task = task_of(plan)
    model = build_model(plan.model_spec)
    load_parameters(model, weights)
    device = resolve_device(site.config.site.device)
    with (
        reproducible_kernels(plan.federation.reproducible),
        explained_memory(physical_batch_size=plan.training.physical_batch_size, device=device),
    ):
        probabilities, targets = score_patients(
            model, task, validation, plan=plan, device=device, deadline=deadline
        )
    counted = count_plan(site.config, plan)
    counts = count_patients(counted, probabilities, targets)
    if charge.event is None:
        return counts
    randomness: RandomnessSource = SecureRandomness()
    if plan.federation.reproducible:
        randomness = ReproducibleRandomness(plan.federation.seed, site.name)
    stream = randomness.stream(purpose="evaluation", round_number=key.round_number, step=0)
    return noised(counted, counts, noise_multiplier=charge.event.noise_multiplier, stream=stream)


def score_patients(
    model: nn.Module,
    task: Task,
    examples: Examples,
    *,
    plan: PublicPlan,
    device: torch.device,
    deadline: float,
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Each patient's mean probabilities (patients, classes) and label (patients, ...), in order. Private.

    At most `max_images_per_patient` images are looked at, the first ones in table order; the label is that of
    the patient's images (`patient_labels`). A patient's numbers are the same bits whoever else is there:
    chunks have one public shape, and where the place in a chunk matters each image is scored alone.
    """
    offsets, rows = examples.unit_rows
    rows, patients = patient_rows(offsets, rows, most=plan.privacy.max_images_per_patient)
    model.to(device).eval()
    shape = (plan.data.channels, plan.data.image_size, plan.data.image_size)
    chunk_rows = rows_per_chunk(model, shape, physical_batch_size=plan.training.physical_batch_size)
    if place_matters(model, input_shape=shape, rows=chunk_rows, scored_for=task):
        chunk_rows = 1
    preprocessing = Preprocessing(image_size=plan.data.image_size, channels=plan.data.channels)
    said = [np.zeros((0, len(task.classes)))]
    with torch.no_grad():
        for start in range(0, len(rows), chunk_rows):
            require_time(deadline, "while the model was scored")
            chunk = rows[start : start + chunk_rows]
            inputs = input_tensor(
                examples, chunk, preprocessing=preprocessing, device=device, filled_to=chunk_rows
            )
            said.append(task.probabilities(model(inputs))[: len(chunk)])
    total = examples.num_units
    means = patient_means(np.concatenate(said), patients, num_patients=total)
    labels = patient_labels(examples.targets, examples.units, num_patients=total, classes=len(task.classes))
    with_rows = np.diff(offsets) > 0
    return means[with_rows], labels[with_rows]


def _stated(
    config: HospitalConfig, plan: PublicPlan, charge: Charge, earlier: Sequence[PrivacyEvent]
) -> dict[str, float | int]:
    """The scalars that go with the counts: public numbers and what this run's evaluations cost so far."""
    stated: dict[str, float | int] = {messages.NUM_EXAMPLES: config.hospital.enrolled_patients}
    if charge.event is None:
        return stated
    stated[messages.NOISE_MULTIPLIER] = charge.event.noise_multiplier
    if plan.claims_privacy:
        cost = running_epsilon([*earlier, charge.event], delta=charge.delta)
        stated |= {messages.EPSILON: cost, messages.DELTA: charge.delta}
    return stated
