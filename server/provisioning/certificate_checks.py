"""Checks of the operator's certificates and secrets."""

from collections.abc import Iterator

from common.checks import Check, CheckState
from common.errors import ConfigError
from common.node_keys import refuse_readable_by_others
from server.provisioning.certificates import days_left, is_issued_by, is_key_of, names_of
from server.provisioning.operator_config import OperatorConfig, OperatorFolder

WARN_DAYS_SERVER, WARN_DAYS_AUTHORITY = 30.0, 365.0
_BACKUP = "restore it from your backup: flower-server restore"


def check_server_certificate(folder: OperatorFolder, config: OperatorConfig) -> Iterator[Check]:
    """Issuer, key, names for the public address, and days left."""
    certificate = folder.server_certificate
    held, left = names_of(certificate), days_left(certificate)
    missing = [name for name in config.network.certificate_names if name not in held]
    problem = ""
    if not is_issued_by(certificate, folder.ca_certificate):
        problem = f"not issued by {folder.ca_certificate}"
    elif not is_key_of(folder.server_key, certificate):
        problem = f"{folder.server_key} is not its key"
    elif missing:
        problem = f"the address needs {', '.join(missing)}, the certificate holds {', '.join(held)}"
    elif left <= 0:
        problem = f"expired {-left:.0f} days ago"
    renew = f"flower-server renew {folder.path}, then start the server again"
    if problem:
        yield Check(name="server certificate", state=CheckState.FAILED, result=problem, fix=renew)
        return
    soon = left < WARN_DAYS_SERVER
    yield Check(
        name="server certificate",
        state=CheckState.WARNING if soon else CheckState.OK,
        result=f"for {', '.join(held)}; {left:.0f} days left",
        fix=renew if soon else "",
    )


def refuse_unusable_certificate(folder: OperatorFolder, config: OperatorConfig) -> None:
    """Raise ConfigError when no hospital could trust the server: expired, or wrong names, key, issuer."""
    for check in check_server_certificate(folder, config):
        if check.state is CheckState.FAILED:
            raise ConfigError("the server certificate cannot be used", why=check.result, fix=check.fix)


def check_authority(folder: OperatorFolder) -> Iterator[Check]:
    """Whether it can still sign, and for how long hospitals will trust it."""
    left = days_left(folder.ca_certificate)
    if not is_key_of(folder.ca_key, folder.ca_certificate):
        result = f"{folder.ca_key} is not the key of {folder.ca_certificate}"
        yield Check(name="authority", state=CheckState.FAILED, result=result, fix=_BACKUP)
        return
    fix = "make a new federation folder with flower-server init and enrol every hospital there"
    state = CheckState.FAILED if left <= 0 else CheckState.WARNING
    if left >= WARN_DAYS_AUTHORITY:
        state, fix = CheckState.OK, ""
    yield Check(name="authority", state=state, result=f"{left:.0f} days left", fix=fix)


def check_secrets(folder: OperatorFolder) -> Iterator[Check]:
    """Modes of the files that nobody else may read."""
    for path in folder.secrets:
        refuse_readable_by_others(path)
    if folder.superexec_secret.stat().st_size < 16:
        result = f"{folder.superexec_secret} holds less than 16 bytes"
        yield Check(name="secrets", state=CheckState.FAILED, result=result, fix=_BACKUP)
        return
    result = f"{len(folder.secrets)} files, readable by their owner only"
    yield Check(name="secrets", state=CheckState.OK, result=result)
