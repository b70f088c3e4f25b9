"""Builds run folders as the server and a simulation leave them, without running anything."""

import json
import math
from pathlib import Path

from common.config import FederationConfig
from common.settings import to_toml

START = 1_790_000_000.0
HOSPITALS = ("north", "south", "east")


def build_config(**federation):
    values = {"federation": {"name": "lungs", "rounds": 6, **federation}}
    values["data"] = {"classes": ["normal", "pneumonia"]}
    return FederationConfig.model_validate(values)


def round_lines(round_number, hospitals=HOSPITALS, *, outcomes=None, epsilon=True, attempt=0):
    """The lines of one closed round: one second long, training .4 s."""
    outcomes = outcomes or {}
    began = START + 2.0 * round_number
    lines = []
    for index, name in enumerate(hospitals):
        outcome, code = outcomes.get(name, ("aggregated", None))
        trained = outcome != "refused"
        lines.append(
            {
                "round": round_number,
                "attempt": attempt,
                "hospital": name,
                "outcome": outcome,
                "code": code,
                "sent": began,
                "training_started": began + 0.1 if trained else None,
                "training_ended": began + 0.5 if trained else None,
                "received": began + 0.6,
                "bytes_down": 60_000,
                "bytes_up": 60_000 if trained else 0,
            }
            | ({"epsilon": math.sqrt(round_number) + index / 10} if epsilon and trained else {})
        )
    aggregated = sum(line["outcome"] == "aggregated" for line in lines)
    closed = {"round": round_number, "attempt": attempt, "closed": began + 1.0, "aggregated": aggregated}
    return [*lines, closed | {"model_sha256": "ab" * 32, "update_norm": 1.5 / round_number}]


def build_run(
    folder: Path, *, rounds=6, private=True, classes=("normal", "pneumonia"), hospitals=HOSPITALS, **more
):
    """A finished simulation; `more` replaces keys of result.json, None removes one."""
    folder.mkdir(parents=True, exist_ok=True)
    config = build_config(private=private)
    data = config.data.model_copy(update={"classes": tuple(classes)})
    (folder / "config.toml").write_text(to_toml(config.model_copy(update={"data": data})))
    lines = []
    for number in range(1, rounds + 1):
        outcomes = {hospitals[-1]: ("late", None)} if number == 2 else {}
        outcomes |= {hospitals[0]: ("refused", "budget-spent")} if number == rounds else {}
        lines += round_lines(number, hospitals, outcomes=outcomes, epsilon=private)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "result.json").write_text(json.dumps(_result(rounds, private, classes, hospitals, more)))
    (folder / "evaluation.json").write_text(json.dumps(build_evaluation(rounds, classes)))
    for index, name in enumerate(hospitals):
        site = folder / "hospitals" / name
        site.mkdir(parents=True, exist_ok=True)
        (site / "hospital.toml").write_text(
            f'[hospital]\nname = "{name}"\nenrolled-patients = {100 * (index + 1)}\n'
            f'[data]\npath = "data"\n[policy]\nepsilon = 3.0\n'
        )
    (folder / "hospitals" / "roster.json").write_text(json.dumps({"hospitals": list(hospitals)}))
    return folder


def _result(rounds, private, classes, hospitals, more):
    result = {
        "schema": 1,
        "run_id": "run-0001",
        "status": "completed",
        "engine": "embedded",
        "seed": 0,
        "private": private,
        "data": {"name": "pneumonia", "task": "classification", "classes": list(classes), "unit": "patient"},
        "model": {"name": "cnn-small", "parameters": 14_600, "sha256": "ab" * 32},
        "rounds": rounds,
        "test": {"auc": 0.871, "accuracy": 0.81, "ci95": {"auc": [0.85, 0.89]}},
        "hospitals": [
            {
                "name": name,
                "enrolled_patients": 100 * (index + 1),
                "epsilon": 2.45 + index / 10 if private else None,
                "epsilon_outsider": 1.1 + index / 10 if private else None,
                "epsilon_outsider_proven": private,
                "epsilon_outsider_reason": "sums only" if private else None,
                "delta": 1e-3 / (index + 1) if private else None,
                "noise_multiplier": 2.5 if private else None,
                "sample_rate": 0.5,
                "steps": rounds,
                "rounds": rounds,
            }
            for index, name in enumerate(hospitals)
        ],
        "wire": {"bytes_up": 1_000_000, "bytes_down": 1_080_000, "bytes_up_float32": 1_000_000},
        "time": {"wall_s": 14.2, "train_s": 7.1, "overhead_s_per_round": 0.12},
    }
    return {key: value for key, value in (result | more).items() if value is not None}


def build_evaluation(rounds, classes=("normal", "pneumonia")):
    curve = [
        {"round": n, "split": "test", "auc": 0.9 - 0.4 / n, "accuracy": 0.8 - 0.2 / n}
        for n in range(1, rounds + 1)
    ]
    points = {"fpr": [0.0, 0.1, 0.3, 1.0], "tpr": [0.0, 0.6, 0.9, 1.0]}
    size = len(classes)
    return {
        "per_round": curve,
        "test": {
            "metrics": {"auc": 0.871, "accuracy": 0.81, "recall": 0.77, "f1": 0.79, "precision": None},
            "ci95": {"auc": [0.85, 0.89], "accuracy": [0.79, 0.83], "precision": None},
            "roc": points if size == 2 else dict.fromkeys(classes, points),
            "calibration": {
                "mean_predicted": [0.1, 0.5, 0.9],
                "fraction_positive": [0.2, 0.4, 0.8],
                "count": [9, 4, 7],
            },
            "ece": 0.043,
            "confusion": [[40 if i == j else 3 + i for j in range(size)] for i in range(size)],
            "classes": list(classes),
        },
        "validation": None,
        "hospitals": {},
    }


def add_assessment(folder: Path):
    """What a simulation adds for a reviewer: operating point, curves, groups, hospitals."""
    path = folder / "evaluation.json"
    content = json.loads(path.read_text())
    content["test"] |= {
        "precision_recall": {"recall": [0.0, 0.5, 1.0], "precision": [1.0, 0.9, 0.6]},
        "roc_band": {"fpr": [0.0, 0.5, 1.0], "low": [0.0, 0.8, 1.0], "high": [0.3, 0.99, 1.0]},
        "thresholds": {
            "threshold": [at / 10 for at in range(11)],
            "sensitivity": [1 - at / 20 for at in range(11)],
            "specificity": [at / 10 for at in range(11)],
        },
        "at_operating_point": {
            "threshold": 0.8,
            "source": "noised validation counts",
            "metrics": {"accuracy": 0.91, "precision": 0.94, "recall": 0.93, "specificity": 0.88},
            "ci95": {"accuracy": [0.9, 0.92], "recall": [0.9, 0.96]},
            "confusion": [[44, 6], [7, 93]],
        },
        "recalibrated": {
            "method": "isotonic regression",
            "ece": 0.021,
            "brier": 0.071,
            "calibration": {
                "mean_predicted": [0.1, 0.9],
                "fraction_positive": [0.15, 0.88],
                "count": [9, 11],
            },
        },
        "subgroups": [
            {
                "by": "sex",
                "group": "female",
                "suppressed": False,
                "patients": 61,
                "rates_suppressed": False,
                "metrics": {"auc": 0.862, "accuracy": 0.9, "balanced_accuracy": 0.89, "recall": 0.92},
                "ci95": {},
            },
            {
                "by": "sex",
                "group": "male",
                "suppressed": False,
                "patients": 52,
                "rates_suppressed": True,
                "metrics": {"accuracy": 0.913},
                "ci95": {},
            },
            {"by": "age", "group": "under 18", "suppressed": True},
        ],
    }
    content["hospitals"] = {
        "north": {"auc": 0.84, "images": 70, "ci95": {"auc": [0.8, 0.88]}},
        "south": {"auc": 0.9, "images": 80, "ci95": {"auc": [0.87, 0.93]}},
    }
    content["worst_hospital"] = {"auc": {"hospital": "north", "value": 0.84}}
    path.write_text(json.dumps(content))
    return folder
