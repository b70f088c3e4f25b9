"""What must be known about a model before its answer is believed: data, epsilon, metrics, limits."""

from collections.abc import Mapping
from typing import Any

from client.prediction.stored_model import StoredModel
from common.pages.html import figure, interval, quantity, spent, tiny_bound

RESEARCH_ONLY = "Research use, not a medical device: no diagnosis may rest on this answer."
_SCORES = ("auc", "accuracy", "balanced_accuracy", "recall", "specificity", "f1", "quadratic_kappa", "mae")


def passport(stored: StoredModel) -> list[tuple[str, str]]:
    """Names and texts, most important first; what the folder does not say is said to be missing."""
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
        ("Privacy", _privacy(description.get("privacy") or {}, hospitals)),
        ("Test patients", _scores(result.get("test") or {})),
        ("Validation patients, noised counts", _scores(result.get("validation") or {})),
        ("Decision", stored.rule),
    ]


def limits(stored: StoredModel) -> list[str]:
    """What a reader must not conclude."""
    lines = [
        RESEARCH_ONLY,
        "Patients, machines and diseases other than those of the training hospitals may be judged wrongly.",
        "The rules that refuse a picture find gross errors only; a grey picture of something else may pass.",
        "A heat map shows what moved the answer, not where a disease is.",
    ]
    if not (stored.description.get("privacy") or {}).get("private"):
        lines.append("The model was trained without privacy: keep it as confidential as patient data.")
    return lines


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
