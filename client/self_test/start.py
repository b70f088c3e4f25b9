"""Is differential privacy really on? Tried on this very machine before the first round of a run, in seconds.

checks = run_checks(Setup(plan=plan, privacy=privacy, examples=images.train, device=device))
[check.name for check in checks if not check.passed]    # nothing is trained unless this is empty

On the run's own network, loss, loader, sampler, optimiser and plan: per-patient clipping, no coupling between
patients, noise of the charged scale, Poisson sampling, nothing un-noised in what leaves. It fails closed: a
check that crashes is a check that failed. It charges nothing, sends nothing, keeps nothing but whether it
passed, and has randomness of its own. What it computes on patients stays here; that the hospital refused does
leave, and would in principle depend on them. Right code is refused by chance at most once in 100,000 starts.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from client.device import resolve_device
from client.images.dataset import HospitalImages
from client.self_test.checks import (
    check_clipping,
    check_coupling,
    check_noise,
    check_places,
    check_sampling,
)
from client.self_test.round_checks import check_release
from client.self_test.setup import Setup
from client.site import Site
from common.config import PublicPlan
from common.errors import FederationError, Refusal, RefusalCode
from common.parameters import Parameters
from common.privacy.plan import PrivacyPlan

CHECKS: Mapping[str, Callable[[Setup], str]] = MappingProxyType(
    {
        "per-patient clipping": check_clipping,
        "no coupling between patients": check_coupling,
        "the same bits in any company": check_places,
        "noise scale": check_noise,
        "Poisson sampling": check_sampling,
        "nothing un-noised leaves": check_release,
    }
)
"""Name and function of each check; the function returns why it is red, or nothing."""
_ATTEMPTS = 3
"""Those of _RETRIED compare float32 sums, in which a maximum can tip over by chance: red is thrice red."""
_RETRIED = (check_clipping, check_coupling, check_release)
_PASSED: set[tuple[str, ...]] = set()


@dataclass(frozen=True, kw_only=True)
class Check:
    """How one check came out."""

    name: str
    passed: bool
    reason: str = ""
    """Why it is red; for the hospital's own eyes."""


def run_checks(setup: Setup) -> list[Check]:
    """Run every check, also after a red one; raises nothing."""
    return [run_check(name, setup) for name in CHECKS]


def run_check(name: str, setup: Setup) -> Check:
    """Run one check of CHECKS; one that raises is red."""
    check = CHECKS[name]
    reason = ""
    for _ in range(_ATTEMPTS if check in _RETRIED else 1):
        try:
            reason = check(setup)
        except Exception as error:  # whatever it is, nobody may train on it
            what = f": {error.what}" if isinstance(error, FederationError) else ""
            reason = f"the check ended with {type(error).__name__}{what}"
        if not reason:
            break
    return Check(name=name, passed=not reason, reason=reason)


def require_self_test(
    site: Site,
    plan: PublicPlan,
    privacy: PrivacyPlan,
    images: HospitalImages,
    *,
    weights: Parameters | None = None,
) -> None:
    """Raise Refusal unless every check passes; once per process, model, training and privacy plan.

    weights: those that arrived with the round, for the check that can use them without telling of patients.
    """
    device = resolve_device(site.config.site.device)
    key = (
        plan.model_spec.model_dump_json(),
        plan.training.model_dump_json(),
        plan.data.model_dump_json(),
        plan.preprocessing.model_dump_json(),
        plan.augmentation.model_dump_json(),
        privacy.digest(),
        str(device),
    )
    if key in _PASSED:
        return
    failed = [
        check
        for check in run_checks(
            Setup(plan=plan, privacy=privacy, examples=images.train, device=device, arrived=weights)
        )
        if not check.passed
    ]
    if failed:
        raise Refusal(
            RefusalCode.SELF_TEST,
            f"the self-test of differential privacy failed: {', '.join(check.name for check in failed)}",
            why="; ".join(check.reason for check in failed),
            fix="train nothing with this installation and report it: what it sends may reveal patients",
        )
    _PASSED.add(key)
