"""`flower-client check`: everything that would stop this hospital later, found before the first round.

Nothing leaves the machine but the signed question whether the server knows the key. It works before the
server is up and before the enrolment has come: what cannot be looked at fails with the reason.
"""

import importlib.metadata
from collections.abc import Callable, Iterator, Sequence

from client.deployment.hospital_folder import HospitalFolder
from client.provisioning.checks_of_server import check_server
from client.provisioning.checks_of_study import check_images_and_plan
from client.provisioning.code_list import accepted
from client.provisioning.standing import LEFT, PAUSED, since
from common.checks import Check, CheckState
from common.enrolment import Enrolment
from common.errors import FederationError
from common.flower_programs import program
from common.health import Health, ask_health
from common.machine import PortState, free_disk_mb, free_memory_mb, port_state
from common.messages import SCHEMA_VERSION
from common.node_keys import load_private_key, public_key_of
from common.settings import load

_DISK_MB, _ENOUGH_DISK_MB = 200.0, 2_000.0
_MEMORY_MB, _ENOUGH_MEMORY_MB = 1_000.0, 3_000.0
_STACK = ("hospital-federation", "flwr", "torch", "opacus")

Say = Callable[[str], None]


def check_hospital(
    folder: HospitalFolder, *, timeout_s: float = 10.0, say: Say = lambda _: None
) -> list[Check]:
    """Every check of the hospital's side; `say` hears which part is being looked at."""
    enrolment = enrolment_or_none(folder)
    parts: Sequence[tuple[str, Callable[[], Iterator[Check]]]] = (
        ("versions", _versions),
        ("enrolment", lambda: _enrolment(folder)),
        ("key", lambda: _key(folder, enrolment)),
        ("server", lambda: check_server(folder, enrolment, timeout_s=timeout_s)),
        ("accepted code", lambda: _accepted_code(folder)),
        ("standing", lambda: _standing(folder)),
        ("ports", lambda: _ports(folder)),
        ("disk", lambda: _disk(folder)),
        ("memory", _memory),
        ("ledger", lambda: _ledger(folder)),
        (
            "images",
            lambda: check_images_and_plan(
                folder, enrolment, watch=lambda what, done, total: say(f"images: {what}, {done} of {total}")
            ),
        ),
    )
    found: list[Check] = []
    for name, part in parts:
        say(name)
        found += guarded(name, part)
    return found


def guarded(name: str, part: Callable[[], Iterator[Check]]) -> list[Check]:
    """What a part finds; its own failure is a failed line."""
    found: list[Check] = []
    try:
        for check in part():
            found.append(check)  # what came before a failure counts
    except FederationError as error:
        result = f"{error.what}: {error.why}" if error.why else error.what
        found.append(Check(name=name, state=CheckState.FAILED, result=result, fix=error.fix))
    except OSError as error:
        found.append(Check(name=name, state=CheckState.FAILED, result=str(error)))
    except Exception as error:  # its words may be a patient's, or those of somebody outside
        found.append(
            Check(
                name=name,
                state=CheckState.FAILED,
                result=f"could not be looked at: {type(error).__name__}",
                fix="this is a defect: report it, with the line `versions`",
            )
        )
    return found


def enrolment_or_none(folder: HospitalFolder) -> Enrolment | None:
    """The enrolment where there is one that can be read."""
    try:
        return load(Enrolment, folder.enrolment_file)
    except (FederationError, OSError, ValueError):  # the part "enrolment" says why
        return None


def _versions() -> Iterator[Check]:
    program("flower-supernode")
    words = [f"{name} {importlib.metadata.version(name)}" for name in _STACK]
    yield Check(
        name="versions", state=CheckState.OK, result=f"{', '.join(words)}; wire schema {SCHEMA_VERSION}"
    )


def _enrolment(folder: HospitalFolder) -> Iterator[Check]:
    enrolment = folder.enrolment()
    yield Check(
        name="enrolment",
        state=CheckState.OK,
        result=f"{enrolment.hospital} with {enrolment.enrolled_patients} patients "
        f"in {enrolment.federation} at {enrolment.address}",
    )


def _key(folder: HospitalFolder, enrolment: Enrolment | None) -> Iterator[Check]:
    own = public_key_of(load_private_key(folder.key_file)).fingerprint
    if enrolment is not None:
        folder.key(enrolment)
    known = "as enrolled" if enrolment else "not enrolled yet"
    yield Check(name="key", state=CheckState.OK, result=f"{own}, {known}, readable by its owner only")


def _accepted_code(folder: HospitalFolder) -> Iterator[Check]:
    codes = accepted(folder.state)
    yield Check(
        name="accepted code",
        state=CheckState.OK if codes else CheckState.FAILED,
        result=", ".join(f"{code.sha256[:16]} ({code.note})" for code in codes)
        or "none: no run can train here",
        fix="" if codes else "flower-client code accept DIGEST",
    )


def _standing(folder: HospitalFolder) -> Iterator[Check]:
    for name, words, fix in (
        (PAUSED, "paused", "flower-client pause --off"),
        (LEFT, "has left the federation", "flower-client leave --off, to take part again"),
    ):
        if begun := since(folder.state, name):
            yield Check(
                name="standing",
                state=CheckState.WARNING,
                result=f"{words} since {begun}: rounds are refused",
                fix=fix,
            )


def _ports(folder: HospitalFolder) -> Iterator[Check]:
    connection = folder.config.connection
    is_running = ask_health(connection.health_port) in (Health.SERVING, Health.NOT_SERVING)
    for setting, port in (("runtime-port", connection.runtime_port), ("health-port", connection.health_port)):
        state = port_state("127.0.0.1", port)
        if state is PortState.FREE or is_running:
            words = "used by this hospital's client" if is_running else "free"
            yield Check(name=setting, state=CheckState.OK, result=f"127.0.0.1:{port} {words}")
        else:
            yield Check(
                name=setting,
                state=CheckState.FAILED,
                result=f"127.0.0.1:{port} is {state}",
                fix=f"end the program that uses it, or choose another connection.{setting} in hospital.toml",
            )


def _disk(folder: HospitalFolder) -> Iterator[Check]:
    free = free_disk_mb(next(path for path in (folder.state, folder.path) if path.exists()))
    yield _amount(
        "disk", free, _DISK_MB, _ENOUGH_DISK_MB, f"free at {folder.state}", "make room on this disk"
    )


def _memory() -> Iterator[Check]:
    free = free_memory_mb()
    if free is not None:
        yield _amount("memory", free, _MEMORY_MB, _ENOUGH_MEMORY_MB, "available", "end other programs")


def _amount(name: str, free: float, least: float, enough: float, where: str, fix: str) -> Check:
    state = CheckState.FAILED if free < least else CheckState.WARNING if free < enough else CheckState.OK
    short = "" if state is CheckState.OK else f"{fix}; {enough:.0f} MiB are comfortable"
    return Check(name=name, state=state, result=f"{free:.0f} MiB {where}", fix=short)


def _ledger(folder: HospitalFolder) -> Iterator[Check]:
    from client.ledger.contradiction import has_ledger, require_borne_out, require_not_gone
    from client.ledger.ledger import Ledger

    path = folder.config.ledger_folder(folder.path)
    require_not_gone(path, folder.state)
    if not has_ledger(path):
        yield Check(name="ledger", state=CheckState.OK, result=f"none yet; made at the first start in {path}")
        return
    ledger = Ledger.examine(path)
    if findings := ledger.verify():
        yield Check(
            name="ledger",
            state=CheckState.FAILED,
            result=f"{len(findings)} finding(s), the first: {findings[0].message}",
            fix=f"flower-client ledger verify {path}; restore its newest backup, or see what "
            f"`flower-client ledger recover {folder.path}` can do from receipts",
        )
        return
    require_borne_out(ledger, folder.state)
    config = folder.config
    cost = ledger.spent(config.delta)
    by_site = config.policy.composition == "site"
    spent = cost.site_epsilon if by_site else cost.epsilon
    is_spent = spent >= config.policy.epsilon
    whose = (
        "a new run has behind it, all charges counted as if everybody had been in each,"
        if by_site
        else "the worst-off patient has spent"
    )
    later = "nobody trains here any more" if by_site else "these patients never train again; new patients can"
    yield Check(
        name="ledger",
        state=CheckState.WARNING if is_spent else CheckState.OK,
        result=f"right, {len(ledger.charges())} charge(s); {whose} "
        f"epsilon {spent:.4g} of {config.policy.epsilon:g} at delta {config.delta:.3g}",
        fix=f"the budget is spent: {later}" if is_spent else "",
    )
