"""Whether a release certificate holds: offline, with nothing but the file (and a key and a model to compare).

Not checked, since no file can show it: that the hospital did what it says. A certificate is its signed word.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.errors import ConfigError, FederationError
from common.privacy.accountant import epsilon as claimed_epsilon
from common.privacy.plan import PrivacyEvent
from common.statements import LARGEST_STATEMENT, RELEASE_CERTIFICATE, Statement, verify_statement

CERTIFICATE = "certificate.json"
_ROUNDING = 1e-6
_LEAST_NOISE, _MOST_STEPS = 0.1, 10_000_000
"""Beyond these an epsilon means nothing any more and would take long to compute."""


@dataclass(frozen=True, kw_only=True)
class CheckedPart:
    """One thing that was looked at."""

    part: str
    ok: bool | None
    """None: it could not be looked at."""
    result: str


def is_right(parts: Sequence[CheckedPart]) -> bool | None:
    """False where something is wrong, None where something could not be looked at, else True."""
    if any(part.ok is False for part in parts):
        return False
    return None if any(part.ok is None for part in parts) else True


def read_certificate(path: Path) -> str:
    """The text of a certificate file. Raises ConfigError where there is none."""
    try:
        if path.stat().st_size > LARGEST_STATEMENT:
            raise ConfigError(f"{path} is too large for a certificate", fix="name the file certificate.json")
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise ConfigError(f"{path} cannot be read", why=why or "", fix="name the file") from None


def check_certificate(
    text: str, *, fingerprint: str | None = None, model: Path | None = None
) -> tuple[Statement | None, list[CheckedPart]]:
    """The statement (None when its signature is wrong) and all that was checked of it.

    `fingerprint` is the key that must have signed, `model` the weights that it must be about.
    """
    try:
        statement = verify_statement(text)
    except ConfigError as error:
        return None, [CheckedPart(part="signature", ok=False, result=error.why or error.what)]
    parts = [
        CheckedPart(part="signature", ok=True, result=f"signed by the key {statement.fingerprint}"),
        CheckedPart(
            part="kind",
            ok=statement.kind == RELEASE_CERTIFICATE,
            result="a release certificate" if statement.kind == RELEASE_CERTIFICATE else "something else",
        ),
        _signer(statement, fingerprint),
    ]
    if statement.kind == RELEASE_CERTIFICATE:
        parts += [_cost(statement.content, part) for part in ("training", "evaluation")]
    if model is not None:
        parts.append(_model(statement.content, model))
    return statement, parts


def _signer(statement: Statement, fingerprint: str | None) -> CheckedPart:
    if fingerprint is None:
        text = (
            "WHO signed was not checked: give --key or --fingerprint, from the roster or the hospital itself"
        )
        return CheckedPart(part="signer", ok=None, result=text)
    if statement.fingerprint == fingerprint:
        return CheckedPart(part="signer", ok=True, result="the key that was expected")
    return CheckedPart(part="signer", ok=False, result=f"another key than {fingerprint}")


def _cost(content: Mapping[str, Any], part: str) -> CheckedPart:
    """Recompute the epsilon from the listed events; it may not be above the stated one."""
    if content.get("claims_privacy") is not True:
        return CheckedPart(part=part, ok=True, result="no privacy is claimed, there is nothing to recompute")
    cost = content.get(part)
    if cost is None:
        is_fine = part != "training"
        return CheckedPart(part=part, ok=is_fine, result="none" if is_fine else "no events are listed")
    try:
        events = [_event(fields) for fields in cost["events"]]
        if not any(event.steps for event in events):
            raise ValueError("no events are listed")
        if cost["epsilon"] is None and content.get("is_complete") is not True:
            return CheckedPart(
                part=part, ok=True, result="no epsilon is stated, since charges may be missing"
            )
        stated, delta = _number(cost["epsilon"]), _number(cost["delta"])
        found = claimed_epsilon(events, delta=delta)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        return CheckedPart(part=part, ok=False, result=f"cannot be recomputed ({error})")
    ok = found <= stated * (1 + _ROUNDING) + 1e-12
    relation = "not above" if ok else "ABOVE"
    result = f"recomputed epsilon {found:.6g}, {relation} the stated {stated:.6g} at delta {delta:.3g}"
    return CheckedPart(part=part, ok=ok, result=result)


def _event(fields: Mapping[str, Any]) -> PrivacyEvent:
    event = PrivacyEvent(
        sampling_rate=_number(fields["sampling_rate"]),
        noise_multiplier=_number(fields["noise_multiplier"]),
        steps=int(fields["steps"]),
    )
    if event.noise_multiplier < _LEAST_NOISE or event.steps > _MOST_STEPS:
        raise ValueError("so little noise or so many steps protect nobody")
    return event


def _number(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError("a number is none")
    return float(value)


def _model(content: Mapping[str, Any], path: Path) -> CheckedPart:
    from common.parameters import parameters_sha256, read_safetensors

    try:
        found = parameters_sha256(read_safetensors(path))
    except FederationError as error:
        raise ConfigError(f"{path} cannot be read as a model", why=error.what, fix="name its file") from None
    model = content.get("model")
    expected = model.get("sha256") if isinstance(model, Mapping) else None
    ok = found == expected
    return CheckedPart(part="model", ok=ok, result="the certified weights" if ok else "OTHER weights")
