"""What a run may claim about privacy, in plain words, after NIST SP 800-226.

The statement names what the guidelines ask of a claim: unit of privacy, neighbouring relation, epsilon and
delta, mechanism, accountant, sampling, scope of the composition, trust model, and what is not covered.
Epsilon is stated twice, for two kinds of observers. A run that is not private says so and claims nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from common.pages.html import bound, quantity, spent, tiny_bound
from server.reporting.run_record import HospitalSummary, RunRecord

_NAMED = 8
"""Hospitals that a sentence names; more are counted."""


@dataclass(frozen=True, kw_only=True)
class PrivacyStatement:
    """A headline, its explanation, facts as (name, text) and what the claim leaves out."""

    private: bool
    headline: str
    explanation: str
    facts: tuple[tuple[str, str], ...]
    not_covered: tuple[str, ...]


def privacy_statement(run: RunRecord) -> PrivacyStatement:
    """The statement for a run; nothing is claimed unless the run is private and every epsilon is known."""
    if run.reproducible:
        return _nothing_claimed(
            "The run is reproducible: sampling and noise follow from the seed, so whoever knows the seed can "
            "take the noise away. It is meant for tests; no epsilon is stated."
        )
    if not run.private:
        return _nothing_claimed(
            "Training ran without differential privacy, as its configuration asked. The updates and the "
            "model may reveal single patients; no epsilon is stated."
        )
    if run.epsilon_max is None:
        return PrivacyStatement(
            private=True,
            headline="Private run, no epsilon to state yet",
            explanation="At least one hospital has not reported what its training cost. Nothing may be "
            f"claimed before. {_unheard(run)}".strip(),
            facts=(),
            not_covered=(),
        )
    unit = run.unit
    if run.epsilon_incomplete:
        return PrivacyStatement(
            private=True,
            headline=f"Differentially private per {unit}; the total epsilon is not known here",
            explanation=f"{_unheard(run)} The updates whose cost this server could read cost epsilon "
            f"{bound(run.epsilon_max)} or less; of the others it claims nothing.",
            facts=tuple(_facts(run)),
            not_covered=tuple(_not_covered(run)),
        )
    return PrivacyStatement(
        private=True,
        headline=f"Differentially private per {unit}: epsilon at most {bound(run.epsilon_max)}",
        explanation=_meaning(unit),
        facts=tuple(_facts(run)),
        not_covered=tuple(_not_covered(run)),
    )


def outsider_epsilon(hospital: HospitalSummary) -> str:
    """A hospital's epsilon against an outsider, as tables show it."""
    return spent(hospital.epsilon_outsider, 3, complete=hospital.epsilon_outsider_complete)


def _nothing_claimed(explanation: str) -> PrivacyStatement:
    return PrivacyStatement(
        private=False, headline="not private", explanation=explanation, facts=(), not_covered=()
    )


def _unheard(run: RunRecord) -> str:
    """Who may have charged more than is known here; empty when nobody."""
    wrong = tuple(h.name for h in run.hospitals if h.epsilon_understated and not h.epsilon_complete)
    names = tuple(name for name in run.epsilon_incomplete if name not in wrong)
    sentences = []
    if names:
        ledger = "its ledger has" if len(names) == 1 else "their ledgers have"
        sentences.append(
            f"At least one update of {_listed(names)} may have been formed that this server never received "
            f"or could not read; {ledger} the full count."
        )
    if wrong:
        sentences.append(
            f"What {_listed(wrong)} stated is less than the updates cost that came from there, as after a "
            "ledger that was lost in mid-run: this server's own count of them stands instead."
        )
    return " ".join(sentences)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:_NAMED]) + (f" and {len(names) - _NAMED} more" if len(names) > _NAMED else "")


def _epsilon_fact(run: RunRecord) -> str:
    if run.epsilon_incomplete:
        return f"{_unheard(run)} What this server could read cost {bound(run.epsilon_max, 3)} or less"
    return f"at most {bound(run.epsilon_max, 3)}; each hospital's own stands in the table of hospitals"


def _outsider_fact(run: RunRecord) -> str:
    """The second epsilon, and for whom it holds or why it is the first again."""
    if run.outsider_max is None:
        return "not stated for this run: nothing smaller than the epsilon above is claimed"
    stated = [h for h in run.hospitals if h.epsilon_outsider is not None]
    complete = all(h.epsilon_outsider_complete for h in stated)
    reasons = dict.fromkeys(h.epsilon_outsider_reason for h in stated)
    if len(reasons) == 1:
        return f"{_at_most(run.outsider_max, complete=complete)}. Why: {next(iter(reasons))}"
    counts = {reason: sum(h.epsilon_outsider_reason == reason for h in stated) for reason in reasons}
    why = "; ".join(f"{count} of {len(stated)} hospitals: {reason}" for reason, count in counts.items())
    return f"{_at_most(run.outsider_max, complete=complete)}. Why: {why}"


def _at_most(epsilon: float, *, complete: bool) -> str:
    return f"at most {bound(epsilon, 3)}" if complete else spent(epsilon, 3, complete=False)


def _meaning(unit: str) -> str:
    whom = "any one patient" if unit == "patient" else "any one image"
    return (
        f"Everything that left the hospitals, the final model included, would have looked almost the same "
        f"without {whom}: no observer gains more than the stated epsilon and delta allow on whether "
        f"that {unit} took part. Smaller numbers protect more."
    )


def _facts(run: RunRecord) -> list[tuple[str, str]]:
    knobs = run.config.privacy if run.config else None
    if run.unit == "patient":
        unit = "one patient with all their images"
        if knobs:
            unit += f", of which at most {knobs.max_images_per_patient} enter a training step"
    else:
        unit = "one image: no patient ids were given, so a patient with several images is protected less"
    sampling = "every patient" if run.unit == "patient" else "every image"
    mechanism = "DP-SGD inside each hospital"
    if knobs:
        sampling += f" enters a step on its own with probability {knobs.sampling_rate:g} (Poisson sampling)"
        mechanism += (
            f": the gradient of each {run.unit}, summed over its images, is clipped to norm "
            f"{knobs.l2_clip_norm:g}; Gaussian noise from the operating system's entropy is added to the sum"
        )
    return [
        ("Unit of privacy", unit),
        (
            "Neighbouring data sets",
            f"add or remove one {run.unit} (unbounded differential privacy); the number of {run.unit}s is "
            "not revealed",
        ),
        ("Epsilon against the server and the other hospitals", _epsilon_fact(run)),
        ("Epsilon against an outsider, who sees the final model only", _outsider_fact(run)),
        ("Delta", f"at most {tiny_bound(run.delta_max)}, by default 1 / (10 x enrolled {run.unit}s)"),
        ("Mechanism", mechanism),
        ("Sampling", sampling),
        (
            "Accountant",
            "privacy loss distributions (PLD) of Google's dp-accounting, pessimistic estimate, "
            "over the steps that were carried out",
        ),
        (
            "Composition",
            f"scope: this run. Each epsilon covers all its rounds for the worst-off {run.unit}; what earlier "
            "runs cost the same ones stands in the hospital's own ledger, which keeps the total within its "
            "budget and tells nobody; hospitals hold different patients, so their epsilons do not add up",
        ),
        (
            "Trust model",
            "noise is added before anything leaves the hospital. Epsilon: neither the server nor the other "
            "hospitals nor the network are trusted with patients; each hospital is trusted with its own. "
            "Epsilon against an outsider, where it is smaller: server and other hospitals are trusted to "
            "pass on no single update, no noise of their own and no wrong noise multiplier",
        ),
        ("Public numbers", _public_numbers(run)),
    ]


def _public_numbers(run: RunRecord) -> str:
    counts = [h.enrolled_patients for h in run.hospitals if h.enrolled_patients is not None]
    total = f" ({quantity(sum(counts))} in all)" if counts else ""
    return f"the plan, and per hospital one rounded count of enrolled {run.unit}s{total}"


def _not_covered(run: RunRecord) -> list[str]:
    limits = [
        "what the model says about a disease in general: it may concern a person who never took part",
        "settings chosen by looking at results of other runs on the same patients, unless those runs were "
        "private and stand in the same ledgers",
        "plans of later runs chosen by looking at what earlier ones released: their numbers (sampling rate, "
        "steps, clip norm) are taken to be chosen without it",
        f"class names, or who is in a study, if chosen by looking at a single {run.unit}",
        "a person who is a patient of several of these hospitals, or has several ids in one: the epsilons "
        "add up",
        "timing, crashes, refusals for reasons of files or machines, and whether a hospital took part in a "
        "round",
        'a hospital\'s noise, and its leaving for want of budget: with composition "site", as installed, '
        "they follow from its earlier studies and from no patient; at a hospital that has chosen composition "
        '"patient" they follow from what these patients spent, and can tell that patients of an earlier run '
        "take part again",
        "floating point, as far as it remains: sums and noise are whole numbers of a public grid, but noise "
        "beyond 8.3 standard deviations (probability 1e-16 a number) has gaps, and the last bits of a "
        "gradient before clipping can depend on which others are in the step",
        "whoever breaks the cipher or foresees the entropy that noise is drawn from",
        "the images where they lie: guarding them is the hospital's task",
    ]
    if any(h.epsilon_outsider_proven for h in run.hospitals):
        limits.append(
            "for the epsilon against an outsider: a hospital that works together with the outsider, the "
            "rounding of each update to float32 before the average, and an update left out of a round for "
            "its size (an honest one is, with probability below 1e-12)"
        )
    if run.test_metrics:
        limits.insert(
            0,
            "the test results in this report: the simulation scored them on held-back patients, exactly and "
            "without noise; a real federation does not have them",
        )
    return limits
