"""Averaging and stacking of finished runs, scored on the test patients that they share.

found = ensemble([Path("runs/a"), Path("runs/b")], stacking=True)
found["average"]["metrics"]["auc"]
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from client.images.splits import TEST, VALIDATION
from common.errors import ConfigError, ModelError
from common.files import write_json_atomically
from common.task_kinds import ONE_CLASS_EACH
from common.tasks import Task, task_of
from simulations.comparison import interval_of, score
from simulations.ensemble_members import AVERAGE, STACKING, Member, read_members
from simulations.ensemble_privacy import composed_costs, to_dict
from simulations.held_back import ScoredSet
from simulations.predictions import predict_splits
from simulations.preparation import HELD_BACK

CONTENT = "ensemble.json"
NO_PRIVACY = (
    "NO PRIVACY IS CLAIMED FOR THE VALIDATION PATIENTS: the weights of stacking were fitted on their exact "
    "labels, as only a simulation may. They are not stored, and no model can be exported with them."
)
_CLOSEST = 1e-6
"""Probabilities are kept this far from 0 and 1 before their log odds are taken."""

FloatArray = NDArray[np.float64]


def ensemble(folders: Sequence[Path], *, stacking: bool = False, out: Path | None = None) -> dict[str, Any]:
    """Everything that is known of the members together: scores, differences, composed epsilon.

    With `out` it is also written there as ensemble.json. Raises ConfigError where the runs do not share their
    patients, ModelError where a model has diverged.
    """
    if out is not None and out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ConfigError(f"--out {out} is not an empty folder", fix="name a new folder")
    members = read_members(folders)
    first = members[0]
    task, test = task_of(first.config), first.held_back.sets[TEST]
    validation = _for_stacking(first, task) if stacking else None
    costs = composed_costs(members)
    asked = {member.name: (member.folder / HELD_BACK, member.config) for member in members}
    said = predict_splits(asked, (TEST, VALIDATION) if validation else (TEST,))
    for name, splits in said.items():
        if not all(np.isfinite(rows).all() for rows in splits.values()):
            raise ModelError(f"{name} has diverged", why="its answers are no numbers", fix="leave it out")
    on_test = {name: splits[TEST] for name, splits in said.items()}
    answers = on_test | {AVERAGE: averaged(list(on_test.values()))}
    if validation is not None:
        known = [splits[VALIDATION] for splits in said.values()]
        answers[STACKING] = stacked(known, validation.targets, list(on_test.values()))
    content = _head(first, test) | _scored(members, answers, test, task)
    if validation is not None:
        patients = len(np.unique(validation.units))
        content[STACKING] |= {"private": False, "fitted_on_patients": patients, "notice": NO_PRIVACY}
    content["privacy"] = to_dict(costs)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        write_json_atomically(out / CONTENT, content)
    return content


def averaged(said: Sequence[FloatArray]) -> FloatArray:
    """(rows, classes) mean of the members' probabilities."""
    return np.asarray(np.mean(said, axis=0), np.float64)


def stacked(
    known: Sequence[FloatArray], targets: NDArray[np.int64], asked: Sequence[FloatArray]
) -> FloatArray:
    """(rows, classes) of `asked` by a logistic regression on the members' log odds, fitted on `known`.

    Each member's answer is (rows, classes); the regression has scikit-learn's own penalty. Raises ConfigError
    where a class is missing among `targets`.
    """
    from sklearn.linear_model import LogisticRegression

    classes = known[0].shape[1]
    if len(np.unique(targets)) < classes:
        raise ConfigError(
            "stacking cannot be fitted",
            why="not every class occurs among the validation patients",
            fix="leave out --stacking, or name more validation patients",
        )
    model = LogisticRegression(max_iter=1000).fit(log_odds(known), targets)
    return np.asarray(model.predict_proba(log_odds(asked)), np.float64)


def log_odds(said: Sequence[FloatArray]) -> FloatArray:
    """(rows, members) of the finding; of more than two classes (rows, members * classes)."""
    columns = [rows[:, 1:] if rows.shape[1] == 2 else rows for rows in said]
    shares = np.clip(np.concatenate(columns, axis=1), _CLOSEST, 1 - _CLOSEST)
    return np.asarray(np.log(shares / (1 - shares)), np.float64)


def _for_stacking(member: Member, task: Task) -> ScoredSet:
    if task.name not in ONE_CLASS_EACH:
        raise ConfigError(
            f"--stacking cannot be used for the task {task.name}",
            why="it is a regression on one class of each image",
            fix="leave it out: averaging is for every task",
        )
    if VALIDATION not in member.held_back.sets:
        raise ConfigError(
            "there are no validation patients to fit the stacking on",
            why="the data name none",
            fix="name them in the data (--split-column), or leave out --stacking",
        )
    return member.held_back.sets[VALIDATION]


def _head(member: Member, test: ScoredSet) -> dict[str, Any]:
    data = member.config.data
    return {
        "schema": 1,
        "data": {"name": member.config.federation.name, "task": data.task, "classes": list(data.classes)},
        "seed": member.scenario.seed,
        "test": {"images": len(test.targets), "units": len(np.unique(test.units))},
    }


def _scored(
    members: Sequence[Member], answers: Mapping[str, FloatArray], test: ScoredSet, task: Task
) -> dict[str, Any]:
    """Scores of everybody, by the same draws of patients, so that differences are paired."""
    seed = members[0].scenario.seed
    scored = {
        name: score(said, test.targets, test.units, seed=seed, task=task) for name, said in answers.items()
    }
    content: dict[str, Any] = {"members": []}
    for member in members:
        about = {
            "run": member.name,
            "run_id": member.run_id,
            "model": member.config.model.name,
            "sha256": member.result["model"]["sha256"],
            "private": member.is_private,
        }
        content["members"].append(about | _block(*scored[member.name]))
    best = max(members, key=lambda member: scored[member.name][0]["auc"] or -1.0).name
    for name in (AVERAGE, STACKING):
        if name not in answers:
            continue
        content[name] = _block(*scored[name]) | {"against": _against(scored[name], scored[best], best)}
    return content


def _block(values: Mapping[str, float | None], samples: Mapping[str, FloatArray]) -> dict[str, Any]:
    bounds = {name: interval_of(drawn) for name, drawn in samples.items()}
    return {"metrics": dict(values), "ci95": {name: pair and list(pair) for name, pair in bounds.items()}}


def _against(
    own: tuple[Mapping[str, float | None], Mapping[str, FloatArray]],
    rival: tuple[Mapping[str, float | None], Mapping[str, FloatArray]],
    name: str,
) -> dict[str, Any]:
    """AUC difference to the best member, which was chosen on the test patients: that favours the member."""
    mine, theirs = own[0]["auc"], rival[0]["auc"]
    bounds = interval_of(own[1]["auc"] - rival[1]["auc"])
    return {
        "member": name,
        "auc_difference": None if mine is None or theirs is None else mine - theirs,
        "ci95": bounds and list(bounds),
    }
