"""The lines of `flower-client check` about the study: images, policy, device, time of a step."""

from collections.abc import Iterator
from typing import TYPE_CHECKING, Literal

from client.deployment.hospital_folder import HospitalFolder
from common.checks import Check, CheckState
from common.config import PublicPlan
from common.enrolment import Enrolment
from common.errors import FederationError

if TYPE_CHECKING:
    import torch

    from client.images.doctor import Checkup

_NOT_PLANNED = PublicPlan()


def check_images_and_plan(folder: HospitalFolder, enrolment: Enrolment | None) -> Iterator[Check]:
    """Read the images as training would; then hold the enrolment's plan against policy and machine."""
    checkup = _look_at_images(folder, enrolment)
    yield from _images(checkup)
    device = _device(folder)
    if isinstance(device, Check):
        yield device
    if enrolment is None:
        yield Check(
            name="study",
            state=CheckState.WARNING,
            result="unknown until enrolment.toml is here: classes, policy and time were not checked",
        )
        return
    yield _policy(folder, enrolment, unit="image" if checkup.unit == "image" else "patient")
    if not isinstance(device, Check):
        step = _dry_step(folder, enrolment, device)
        yield step
        if enrolment.plan.federation.private and step.state is not CheckState.FAILED:
            yield _self_test(folder, enrolment, device)


def _look_at_images(folder: HospitalFolder, enrolment: Enrolment | None) -> "Checkup":
    from client.images.doctor import check_images
    from common.preprocessing import Preprocessing

    config, data = folder.config, (enrolment.plan if enrolment else _NOT_PLANNED).data
    return check_images(
        config.data,
        preprocessing=Preprocessing(image_size=data.image_size, channels=data.channels),
        classes=data.classes if enrolment else config.data.classes or None,
        task=data.task,
        cache_folder=folder.path / (config.site.cache or "cache"),
        split_key=_split_key(folder),
    )


def _split_key(folder: HospitalFolder) -> bytes:
    """What decides who validates, as `client.site`; before the first ledger something of the same kind."""
    from client.images.splits import split_key
    from client.ledger.ledger import Ledger

    try:
        site_key = Ledger.examine(folder.config.ledger_folder(folder.path)).site_key
    except (FederationError, OSError):
        site_key = b"no ledger yet"
    return split_key(site_key)


def _images(checkup: "Checkup") -> Iterator[Check]:
    rows = checkup.rows()
    if checkup.problem is not None:
        (_, result, fix) = rows[0]
        yield Check(name="images", state=CheckState.FAILED, result=result, fix=fix)
        return
    for name, result, fix in rows:
        failed = name == "skipped in all" and not checkup.is_usable
        state = CheckState.FAILED if failed else CheckState.WARNING if fix else CheckState.OK
        yield Check(name=name, state=state, result=result, fix=fix)


def _device(folder: HospitalFolder) -> "torch.device | Check":
    from client.device import resolve_device

    try:
        return resolve_device(folder.config.site.device)
    except FederationError as error:
        return Check(
            name="device", state=CheckState.FAILED, result=f"{error.what}: {error.why}", fix=error.fix
        )


def _policy(folder: HospitalFolder, enrolment: Enrolment, *, unit: Literal["patient", "image"]) -> Check:
    """Whether this hospital would take part in the plan with fresh patients, and with how much noise."""
    from client.limits import Behind
    from client.policy import TrainingRequest, agree

    try:
        request = TrainingRequest.of(enrolment.plan, round_number=1, unit=unit)
        agreed = agree(folder.config, request, Behind())
    except FederationError as error:
        words = f"would refuse: {error.what}{': ' + error.why if error.why else ''}"
        return Check(name="policy", state=CheckState.FAILED, result=words, fix=error.fix)
    rounds, steps = enrolment.plan.federation.rounds, enrolment.plan.privacy.local_steps
    if agreed is None:
        result = f"would train {rounds} rounds WITHOUT PRIVACY: policy.allow-non-private"
        return Check(name="policy", state=CheckState.WARNING, result=result)
    policy = folder.config.policy
    return Check(
        name="policy",
        state=CheckState.OK,
        result=f"takes part: {rounds} rounds of {steps} step(s) with noise multiplier "
        f"{agreed.noise_multiplier:.3g}, epsilon {policy.epsilon:g}, delta {folder.config.delta:.3g}",
    )


def _dry_step(folder: HospitalFolder, enrolment: Enrolment, device: "torch.device") -> Check:
    import torch

    from client.provisioning.dry_step import dry_step_seconds

    config, plan = folder.config, enrolment.plan
    if config.site.threads:
        torch.set_num_threads(config.site.threads)
    try:
        seconds = dry_step_seconds(plan, enrolled_patients=config.hospital.enrolled_patients, device=device)
    except FederationError as error:
        return Check(
            name="dry step", state=CheckState.FAILED, result=f"{error.what}: {error.why}", fix=error.fix
        )
    name = (
        torch.cuda.get_device_name(device) if device.type == "cuda" else f"{torch.get_num_threads()} threads"
    )
    a_round = seconds * plan.privacy.local_steps
    is_slow = a_round > config.policy.maximum_round_s
    return Check(
        name="dry step",
        state=CheckState.WARNING if is_slow else CheckState.OK,
        result=f"{seconds:.2g} s for a private step of {plan.model.name} on {device} ({name}); "
        f"about {a_round:.2g} s a round, {a_round * plan.federation.rounds:.3g} s the run",
        fix="above policy.maximum-round-s: take a faster device, or agree on fewer steps" if is_slow else "",
    )


def _self_test(folder: HospitalFolder, enrolment: Enrolment, device: "torch.device") -> Check:
    from client.provisioning.dry_step import dry_self_test

    patients = folder.config.hospital.enrolled_patients
    checks = dry_self_test(enrolment.plan, enrolled_patients=patients, device=device)
    failed = [f"{check.name} ({check.reason})" for check in checks if not check.passed]
    return Check(
        name="privacy self-test",
        state=CheckState.FAILED if failed else CheckState.OK,
        result=f"failed: {'; '.join(failed)}"
        if failed
        else f"{len(checks)} checks of every private run pass",
        fix="this hospital would refuse to train: report it with this line" if failed else "",
    )
