"""`flower-server check`: everything that would stop the federation later, found before the first round."""

import importlib.metadata
import platform
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from common.bundle.bundle import bundle_sha256
from common.checks import Check, CheckState
from common.errors import FederationError
from common.flower_programs import program
from common.messages import SCHEMA_VERSION
from server.provisioning.certificate_checks import (
    check_authority,
    check_secrets,
    check_server_certificate,
)
from server.provisioning.enrolments import is_up_to_date
from server.provisioning.machine_checks import (
    check_clock,
    check_database,
    check_disk,
    check_memory,
    check_ports,
)
from server.provisioning.new_federation import model_problem
from server.provisioning.operator_config import OperatorConfig, OperatorFolder
from server.provisioning.roster import read_roster
from server.provisioning.run_lookup import changed_settings, describe_run


def check_operator(folder: OperatorFolder) -> list[Check]:
    """Every check of the operator's side; what cannot be looked at is a failed line, never an exception."""
    try:
        config = folder.config()
    except FederationError as error:
        return [_failed("settings", error), *_guarded("versions", _versions)]
    parts: Sequence[tuple[str, Callable[[], Iterator[Check]]]] = (
        ("settings", lambda: _settings(config)),
        ("versions", _versions),
        ("clock", lambda: check_clock(folder)),
        ("server certificate", lambda: check_server_certificate(folder, config)),
        ("authority", lambda: check_authority(folder)),
        ("secrets", lambda: check_secrets(folder)),
        ("roster", lambda: _roster(folder, config)),
        ("ports", lambda: check_ports(folder, config)),
        ("disk", lambda: check_disk(folder)),
        ("memory", check_memory),
        ("database", lambda: check_database(folder)),
        ("run", lambda: _run(folder, config)),
    )
    return [check for name, part in parts for check in _guarded(name, part)]


def _guarded(name: str, part: Callable[[], Iterator[Check]]) -> list[Check]:
    found = []
    try:
        for check in part():
            found.append(check)
    except FederationError as error:
        found.append(_failed(name, error))
    except OSError as error:
        found.append(Check(name=name, state=CheckState.FAILED, result=str(error)))
    return found


def _failed(name: str, error: FederationError) -> Check:
    result = f"{error.what}: {error.why}" if error.why else error.what
    return Check(name=name, state=CheckState.FAILED, result=result, fix=error.fix)


def _settings(config: OperatorConfig) -> Iterator[Check]:
    plan = config.federation
    if problem := model_problem(config):
        yield Check(name="settings", state=CheckState.FAILED, result=problem, fix="correct [model] or [data]")
    elif not config.claims_privacy:
        why = "reproducible" if plan.reproducible else "private = false"
        yield Check(
            name="settings",
            state=CheckState.WARNING,
            result=f"{plan.name} trains WITHOUT privacy ({why}); hospitals refuse unless they allow it",
            fix="set private = true and reproducible = false in [federation], unless it is meant",
        )
    elif config.server.quorum < 2:
        yield Check(
            name="settings",
            state=CheckState.WARNING,
            result="quorum = 1: a round may be the update of a single hospital",
            fix="set quorum to 2 or more in [server]",
        )
    else:
        result = f"{plan.name}: {plan.rounds} rounds of {config.model.name}, quorum {config.server.quorum}"
        yield Check(name="settings", state=CheckState.OK, result=result)


def _versions() -> Iterator[Check]:
    program("flower-superlink")
    ours, flower = (importlib.metadata.version(name) for name in ("hospital-federation", "flwr"))
    result = (
        f"hospital-federation {ours}, Flower {flower}, Python {platform.python_version()}, "
        f"wire schema {SCHEMA_VERSION}, bundle {bundle_sha256()[:16]}"
    )
    fits = flower.split(".")[:2] == ["1", "41"]
    state, fix = (CheckState.OK, "") if fits else (CheckState.FAILED, "install flwr>=1.41,<1.42")
    yield Check(name="versions", state=state, result=result, fix=fix)


def _roster(folder: OperatorFolder, config: OperatorConfig) -> Iterator[Check]:
    active = [entry for entry in read_roster(folder.roster) if entry.is_active]
    needed = max(config.server.quorum, config.runtime.expected_hospitals)
    stale = [entry.name for entry in active if not is_up_to_date(folder, config, entry)]
    shown = f"{len(active)} enrolled, {needed} needed for a round"
    if len(active) < needed:
        fix = "flower-server enroll NAME KEY.pub --patients N, or a smaller quorum in [server]"
        yield Check(name="roster", state=CheckState.FAILED, result=shown, fix=fix)
    elif stale:
        yield Check(
            name="roster",
            state=CheckState.WARNING,
            result=f"{shown}; the enrolment file of {', '.join(stale)} is not that of today's settings",
            fix="enroll them again with the same key and count, and send the new files",
        )
    else:
        yield Check(name="roster", state=CheckState.OK, result=shown)


def _run(folder: OperatorFolder, config: OperatorConfig) -> Iterator[Check]:
    path: Path | None = folder.run_folder()
    if path is None:
        yield Check(name="run", state=CheckState.OK, result="none yet: flower-server start begins one")
        return
    if changed := changed_settings(path, config):
        yield Check(
            name="run",
            state=CheckState.FAILED,
            result=f"{path.name} began with other settings: {', '.join(changed)}",
            fix="set them as in config.toml of the run folder, or begin a new run: flower-server start --new",
        )
        return
    result, fix = describe_run(path)
    yield Check(name="run", state=CheckState.OK if not fix else CheckState.WARNING, result=result, fix=fix)
