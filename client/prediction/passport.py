"""What must be known about a model before its answer is believed: data, epsilon, metrics, limits."""

from collections.abc import Mapping
from typing import Any

from client.prediction.ensemble import Ensemble
from client.prediction.stored_model import StoredModel
from common.pages.html import bound, figure, interval, quantity, spent, tiny_bound

RESEARCH_ONLY = "Research use, not a medical device: no diagnosis may rest on this answer."
_SCORES = ("auc", "accuracy", "balanced_accuracy", "recall", "specificity", "f1", "quadratic_kappa", "mae")


def passport(stored: StoredModel | Ensemble) -> list[tuple[str, str]]:
    """Names and texts, most important first; what the folder does not say is said to be missing."""
    if isinstance(stored, Ensemble):
        return _of_ensemble(stored)
    description, result = stored.description, stored.result
    data = result.get("data", {})
    hospitals = result.get("hospitals", [])
    prepared = stored.preprocessing
    return [
        ("Model", f"{stored.spec.name}, {quantity(description.get('parameters'))} weights"),
        ("Run", f"{stored.run_id}, {description.get('rounds', '?')} rounds"),
        ("Hash of the weights", stored.sha256),
        ("Trained on", _data(data, hospitals)),
        ("Classes", ", ".join(stored.task.classes)),
        ("Sees", f"{prepared.image_size} x {prepared.image_size} pixels, {_colours(prepared.channels)}"),
        *([("Answers about", stored.form.words)] if stored.form.is_series else []),
        ("Privacy", _privacy(description.get("privacy") or {}, hospitals)),
        ("Test patients", _scores(result.get("test") or {})),
        ("Validation patients, noised counts", _scores(result.get("validation") or {})),
        ("Decision", stored.rule),
    ]


def limits(stored: StoredModel | Ensemble) -> list[str]:
    """What a reader must not conclude."""
    lines = [
        RESEARCH_ONLY,
        "Patients, machines and diseases other than those of the training hospitals may be judged wrongly.",
        "The rules that refuse a picture find gross errors only; without --reference a grey picture of "
        "something else may pass.",
        "A heat map shows what moved the answer, not where a disease is.",
    ]
    members = stored.members if isinstance(stored, Ensemble) else (stored,)
    if not all((member.description.get("privacy") or {}).get("private") for member in members):
        lines.append("The model was trained without privacy: keep it as confidential as patient data.")
    return lines


def _of_ensemble(ensemble: Ensemble) -> list[tuple[str, str]]:
    """Every member by its hash and privacy, and what all of them have cost patients whom they share."""
    facts = []
    for number, member in enumerate(ensemble.members, start=1):
        of_member = dict(passport(member))
        named = ("Model", "Run", "Hash of the weights", "Trained on", "Sees", "Privacy")
        facts.append((f"Member {number}", "; ".join(of_member[name] for name in named)))
    privacy = ensemble.privacy
    whole = privacy["what"]
    if privacy["epsilon_at_most"] is not None:
        epsilon, delta = bound(privacy["epsilon_at_most"]), tiny_bound(privacy["delta_at_most"])
        whole = f"epsilon at most {epsilon}, delta {delta}. {whole}"
    return [
        ("Ensemble", f"the average of {len(ensemble.members)} models"),
        *facts,
        ("Privacy of all members together", whole),
        ("Classes", ", ".join(ensemble.task.classes)),
        ("Test patients", "not stated: the ensemble was not evaluated (flower-simulate ensemble does that)"),
        ("Decision", ensemble.rule),
    ]


def _data(data: Mapping[str, Any], hospitals: list[Mapping[str, Any]]) -> str:
    if not data:
        return "not stated in this folder; the model card may say it"
    patients = sum(int(entry.get("enrolled_patients") or 0) for entry in hospitals)
    whose = f", {len(hospitals)} hospitals with {quantity(patients)} enrolled patients" if hospitals else ""
    return f"{data.get('name', 'unnamed data')}{whose}; one unit is one {data.get('unit', 'patient')}"


def _privacy(privacy: Mapping[str, Any], hospitals: list[Mapping[str, Any]]) -> str:
    if not privacy.get("private"):
        return "none: trained without differential privacy"
    of_hospitals = (privacy.get("hospitals") or {}).values()
    known = [entry["epsilon"] for entry in of_hospitals if entry.get("epsilon") is not None]
    deltas = [entry["delta"] for entry in of_hospitals if entry.get("delta")]
    text = spent(max(known, default=None), complete=bool(privacy.get("epsilon_complete")) and bool(known))
    delta = f", delta {tiny_bound(max(deltas))}" if deltas else ""
    return f"epsilon {text} for each {privacy.get('unit', 'patient')} of the hospital that spent most{delta}"


def _scores(scores: Mapping[str, Any]) -> str:
    bounds = scores.get("ci95") or {}
    found = []
    for name in _SCORES:
        if scores.get(name) is not None:
            between = interval(bounds.get(name))
            written = f" ({between})" if between else ""
            found.append(f"{name.replace('_', ' ')} {figure(scores[name])}{written}")
    return ", ".join(found).replace("auc", "AUC") or "not stated in this folder"


def _colours(channels: int) -> str:
    return "grey" if channels == 1 else "colour"
