"""The release certificate: what this hospital says, and signs, of one run and one model.

It lists the events that the hospital carried out in the run and what they cost one of its patients, so that
anybody can recompute the epsilon from the certificate alone. It holds no count of patients beyond the public
one and nothing of other runs: what a patient has spent in all stays in the ledger.
"""

import importlib.metadata
import json
import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from client.certificate_check import CERTIFICATE
from client.ledger.records import EVALUATION, LOST, RECOVERY, TRAINING, Charge
from client.site import Site
from common.config import ModelSpec
from common.errors import ConfigError
from common.files import write_bytes_atomically
from common.messages import SCHEMA_VERSION
from common.node_keys import load_private_key, make_key
from common.privacy.accountant import merge, running_epsilon
from common.privacy.plan import NEIGHBOURING_RELATION, PrivacyEvent
from common.statements import RELEASE_CERTIFICATE, sign_statement, verify_statement

ACCOUNTANT = "dp-accounting"
DP_SGD, NOISED_COUNTS = "DP-SGD: Poisson-subsampled Gaussian", "Gaussian noise on counts"
COMPOSITION = (
    "this run only, over all events listed; what other runs have cost the same patients is kept within the "
    "hospital's budget by its ledger and is not disclosed here"
)
NO_CLAIM = (
    "no privacy is claimed for this run: it trained without noise, or with noise that others can recompute"
)
RECOVERED = (
    "the hospital's ledger was recovered in this run or before it: charges of the run may be missing from "
    "the events listed"
)
_CLAIM = "what this hospital let out in this run is (epsilon, delta)-differentially private for its patients"
_NOT_COMPARED = ("date", "software")


def write_certificate(
    site: Site, *, run_id: str, spec: ModelSpec, model_sha256: str, description: Mapping[str, Any]
) -> str:
    """Write `models/<run>/certificate.json` and return its text; asked again, the same bytes.

    Raises ConfigError when the hospital's key cannot be used, OSError when the disk takes nothing.
    """
    everything = site.ledger.charges()
    charges = [charge for charge in everything if charge.key.run_id == run_id]
    content = certificate_content(
        site.name,
        run_id=run_id,
        model={"name": spec.name, "sha256": model_sha256},
        charges=charges,
        outsider=_outsider(description, site.name),
        is_complete=not any(charge.purpose == RECOVERY for charge in everything),
    )
    path = site.models_folder / run_id / CERTIFICATE
    standing = _standing(path)
    if standing is not None and _compared(verify_statement(standing).content) == _compared(content):
        return standing
    text = sign_statement(hospital_key(site), kind=RELEASE_CERTIFICATE, content=content)
    write_bytes_atomically(path, text.encode(), mode=0o600)
    return text


def certificate_content(
    hospital: str,
    *,
    run_id: str,
    model: Mapping[str, str],
    charges: Sequence[Charge],
    outsider: float | None,
    is_complete: bool = True,
) -> dict[str, Any]:
    """What a certificate says, from the charges of one run and the server's second epsilon.

    `is_complete` is False where the ledger was recovered from a backup: charges of this run may be missing,
    so no epsilon is stated. (The recovery charged everybody with all that was lost, other runs' charges too.)
    """
    training = [charge for charge in charges if charge.purpose == TRAINING]
    evaluation = [charge for charge in charges if charge.purpose == EVALUATION]
    claims = bool(charges) and all(charge.claims_privacy for charge in charges)
    content: dict[str, Any] = {
        "hospital": hospital,
        "run_id": run_id,
        "model": dict(model),
        "claims_privacy": claims,
        "claim": (_CLAIM if is_complete else RECOVERED) if claims else NO_CLAIM,
        "rounds_answered": len({c.key.round_number for c in training if c.sealed_sha256 not in (None, LOST)}),
        "is_complete": is_complete,
        "training": _cost(training, DP_SGD, is_complete=is_complete) if claims and training else None,
        "evaluation": _cost(evaluation, NOISED_COUNTS, is_complete=is_complete)
        if claims and evaluation
        else None,
        "outsider": {"stated_by": "server", "epsilon": outsider} if claims else None,
        "unit": _unit(charges),
        "neighbouring_relation": NEIGHBOURING_RELATION,
        "composition": COMPOSITION,
        "accountant": {"name": ACCOUNTANT, "version": importlib.metadata.version(ACCOUNTANT)},
        "software": {name: importlib.metadata.version(name) for name in ("hospital-federation", "flwr")},
        "wire_schema": SCHEMA_VERSION,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return content


def hospital_key(site: Site) -> ec.EllipticCurvePrivateKey:
    """The key that this hospital proves itself with; a simulated hospital, which has none, makes one.

    A running client goes on with its copy of the key, whatever renew-key does meanwhile.
    """
    in_use = site.state_folder / "secrets" / "hospital.key"
    path = site.folder / site.config.connection.key
    if not in_use.is_file() and not path.is_file():
        make_key(path, path.with_name(f"{path.name}.pub"), comment=site.name)
    return load_private_key(in_use if in_use.is_file() else path)


def _cost(charges: Sequence[Charge], mechanism: str, *, is_complete: bool) -> dict[str, Any]:
    """Events and their cost to a unit that was in all of them: at least what the worst unit has spent.

    That is the ledger's own number wherever all charges are on the same patients. Where they are not, the
    difference would tell that patients came or went.
    """
    clips = {_kind(c.event): c.l2_clip_norm for c in charges if c.event is not None}
    events = [charge.event for charge in charges if charge.event is not None]
    delta = max(charge.delta for charge in charges)
    epsilon = running_epsilon(events, delta=delta)
    stated = [charge.epsilon for charge in charges if charge.epsilon is not None]
    if len({(charge.cohort_digest, charge.delta) for charge in charges}) == 1 and stated:
        epsilon = min(epsilon, max(stated))
    cost: dict[str, Any] = {
        "mechanism": mechanism,
        "events": [
            {"sampling_rate": q, "noise_multiplier": sigma, "l2_clip_norm": clips[(q, sigma)], "steps": steps}
            for q, sigma, steps in merge(events)
        ],
        "epsilon": epsilon if is_complete else None,
        "delta": delta,
    }
    return cost if is_complete else {**cost, "no_epsilon_because": RECOVERED}


def _kind(event: PrivacyEvent) -> tuple[float, float]:
    return float(event.sampling_rate), float(event.noise_multiplier)


def _unit(charges: Sequence[Charge]) -> str:
    units = {charge.unit for charge in charges}
    return units.pop() if len(units) == 1 else "image"


def _outsider(description: Mapping[str, Any], hospital: str) -> float | None:
    """The server's epsilon against an outsider for this hospital, if model.json states one."""
    try:
        value = description["privacy"]["hospitals"][hospital]["epsilon_outsider"]
    except (KeyError, TypeError):
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return float(value) if is_number and math.isfinite(value) and value >= 0 else None


def _standing(path: Path) -> str | None:
    try:
        text = path.read_text()
        verify_statement(text)
    except (OSError, UnicodeDecodeError, ConfigError):
        return None
    return text


def _compared(content: Mapping[str, Any]) -> str:
    """What makes a certificate this one; the day it was written and the release that wrote it do not."""
    return json.dumps({k: v for k, v in content.items() if k not in _NOT_COMPARED}, sort_keys=True)
