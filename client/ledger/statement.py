"""What a hospital states of its ledger to others, signed: costs and rounds, no patient and no count of any.

The epsilon follows the hospital's own rule of composition. With `site` it is an upper bound for each patient
that does not depend on who took part in what, counted as the budget is. Beside it stands what a patient would
have spent who was in every charge, training and validation of every run alike: what a new run has behind it,
and nobody's own.
"""

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from cryptography.hazmat.primitives.asymmetric import ec

from client.ledger.ledger import Ledger
from client.ledger.records import Charge, Composition, RunSpent
from common.errors import ConfigError
from common.hospital_config import HospitalConfig
from common.privacy.plan import NEIGHBOURING_RELATION
from common.statements import SCHEMA, sign_statement, verify_statement

KIND = "ledger"
_RULES = {
    "site": "all charges of the ledger together, as if every patient had been in each of them, but training "
    "and validation of the last run apart, as the budget counts them: in one run nobody does both (PLD)",
    "patient": "all charges that hold the patient who has the most behind them (PLD)",
}


def ledger_content(ledger: Ledger, config: HospitalConfig) -> dict[str, Any]:
    """The statement's content, plain JSON values."""
    rule, delta = config.policy.composition, config.delta
    charges, spent = ledger.charges(), ledger.spent(delta)
    return {
        "hospital": config.hospital.name,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "epsilon": _number(spent.limit_epsilon if rule == "site" else spent.epsilon),
        # Under `patient` it would tell how far patients overlap; under `site` both come from charges alone.
        "epsilon_as_if_all_in_every_charge": _number(spent.site_epsilon) if rule == "site" else None,
        "delta": delta,
        "budget_epsilon": config.policy.epsilon,
        "all_training_private": spent.private,
        "composition": _RULES[rule],
        "neighbouring_relation": f"{NEIGHBOURING_RELATION}: the unit of each run, with all its images",
        "charges": len(charges),
        "chain_head": charges[-1].hash if charges else "",
        "runs": [_run([c for c in charges if c.key.run_id == run.run_id], run, rule) for run in spent.runs],
    }


def signed_content(content: dict[str, Any], key: ec.EllipticCurvePrivateKey | None) -> str:
    """The statement as text, signed, or marked as unsigned without a key."""
    if key is not None:
        return sign_statement(key, kind=KIND, content=content)
    unsigned = {"schema": SCHEMA, "kind": KIND, "content": content, "unsigned": True}
    return json.dumps(unsigned, indent=2, ensure_ascii=False, allow_nan=False)


def read_statement(text: str) -> tuple[str, dict[str, Any]]:
    """Fingerprint of the signer and content. Raises ConfigError unless it is a signed ledger statement."""
    statement = verify_statement(text)
    if statement.kind != KIND:
        raise ConfigError(
            f"this is a signed {statement.kind[:40]!r}, no statement of a ledger",
            fix="name a file that flower-client ledger export has written",
        )
    return statement.fingerprint, statement.content


def _run(charges: Sequence[Charge], spent: RunSpent, rule: Composition) -> dict[str, Any]:
    events = [charge.event for charge in charges if charge.event is not None and charge.event.steps]
    cost = spent.site_epsilon if rule == "site" else spent.epsilon
    return {
        "run_id": spent.run_id,
        "rounds": spent.rounds,
        "steps": spent.steps,
        "evaluations": spent.evaluations,
        "sampling_rates": sorted({event.sampling_rate for event in events}),
        "noise_multipliers": sorted({event.noise_multiplier for event in events}),
        "epsilon": None if cost is None else _number(cost),
        "claims_privacy": spent.claims_privacy,
        "units": sorted({charge.unit for charge in charges}),
    }


def _number(value: float) -> float | None:
    """None for infinity, which JSON does not have."""
    return value if value < float("inf") else None
