"""The three lines about a spent budget: used, asked, limit, and when it would be allowed again."""

from collections.abc import Sequence

from client.ledger.records import Composition
from common.errors import BudgetError
from common.privacy.accountant import running_epsilon
from common.privacy.plan import PrivacyEvent

_COUNTED = {
    "site": ", composed as if every patient had been in all charges, training and validation of earlier runs "
    "alike: at least what any patient has spent",
    "patient": ", of the patient who has the most behind them",
}


def budget_error(
    what: str,
    *,
    history: Sequence[PrivacyEvent],
    event: PrivacyEvent,
    limit: float,
    delta: float,
    composition: Composition,
) -> BudgetError:
    """The refusal of `event` after `history`: with `site` nobody's own, but that of all charges together."""
    used = running_epsilon(history, delta=delta)
    with_it = running_epsilon([*history, event], delta=delta)
    return BudgetError(
        what,
        why=f"used: epsilon {used:.4g} of the limit {limit:g} at delta {delta:.3g}, in all studies together"
        f"{_COUNTED[composition]}; asked: {event.steps} step(s) at noise multiplier "
        f"{event.noise_multiplier:g}, which would make it {with_it:.4g}",
        fix="allowed again: never for these patients; with new patients' data, or a larger policy.epsilon, "
        "which is a decision about your patients (new patients help where policy.composition is 'patient')",
    )
