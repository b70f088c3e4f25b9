"""Logistic regression, support vector machine and random forest (scikit-learn's) as probabilities per class.

Settings are the library's own or usual ones and tuned on nothing. One thread; the seed decides everything.
"""

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from common.task_kinds import MULTI_LABEL
from common.tasks import Task

FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

LOGISTIC, SVM, FOREST = "logistic regression", "SVM", "random forest"
METHODS: Final = (LOGISTIC, SVM, FOREST)
MOST_SVM_ROWS = 10_000
"""Images that an SVM learns from, drawn by the seed where there are more: its time grows as their square."""
_FOLDS = 3


def fitted_probabilities(
    method: str,
    task: Task,
    *,
    features: NDArray[np.float32],
    targets: IntArray,
    units: IntArray,
    asked: NDArray[np.float32],
    seed: int,
) -> FloatArray:
    """Probabilities (rows of `asked`, classes) after training on `features` (rows, width) and their targets.

    A class that no training row has gets 0. With several findings each is a question of its own; ordered
    levels are classes without order. `units` (rows,) keep a patient's images on one side of a calibration.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        if task.name != MULTI_LABEL:
            return _ask(method, features, targets, units, asked, num_classes=len(task.classes), seed=seed)
        findings = [
            _ask(method, features, targets[:, k], units, asked, num_classes=2, seed=seed)[:, 1]
            for k in range(len(task.classes))
        ]
        return np.stack(findings, axis=1)


def _ask(
    method: str,
    features: NDArray[np.float32],
    labels: IntArray,
    units: IntArray,
    asked: NDArray[np.float32],
    *,
    num_classes: int,
    seed: int,
) -> FloatArray:
    if method == SVM and len(labels) > MOST_SVM_ROWS:
        drawn = np.sort(np.random.default_rng([seed, 0x5F3]).permutation(len(labels))[:MOST_SVM_ROWS])
        features, labels, units = features[drawn], labels[drawn], units[drawn]
    said = np.zeros((len(asked), num_classes))
    present = np.unique(labels)
    if len(present) == 1:
        said[:, present] = 1.0
        return said
    classifier = _classifier(method, labels, units, seed=seed).fit(features, labels)
    said[:, classifier.classes_] = classifier.predict_proba(asked)
    return said


def _classifier(method: str, labels: IntArray, units: IntArray, *, seed: int) -> Any:
    from sklearn.ensemble import RandomForestClassifier
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    if method == LOGISTIC:
        return make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000, random_state=seed))
    if method == FOREST:
        return RandomForestClassifier(random_state=seed, n_jobs=1)
    if method == SVM:
        return _calibrated_svm(labels, units, seed=seed)
    raise ValueError(f"method {method!r} is none of {', '.join(METHODS)}")


def _calibrated_svm(labels: IntArray, units: IntArray, *, seed: int) -> Any:
    """RBF kernel; Platt's sigmoid on scores of training patients whom the scoring machine never saw."""
    from sklearn.calibration import CalibratedClassifierCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler
    from sklearn.svm import SVC

    machine = make_pipeline(StandardScaler(), SVC(kernel="rbf"))
    folds = _folds_of_patients(labels, units, seed=seed)
    return CalibratedClassifierCV(machine, method="sigmoid", cv=folds, ensemble=False, n_jobs=1)


def _folds_of_patients(labels: IntArray, units: IntArray, *, seed: int) -> list[tuple[IntArray, IntArray]]:
    """Rows to learn from and rows to calibrate on, no patient among both.

    Where a class has too few patients to be on both sides of every fold, all rows are on both: the order of
    the answers is the same then, but they are too sure.
    """
    from sklearn.model_selection import StratifiedGroupKFold

    everything = np.arange(len(labels))
    classes = np.unique(labels)
    if min(len(np.unique(units[labels == label])) for label in classes) < _FOLDS:
        return [(everything, everything)]
    splitter = StratifiedGroupKFold(_FOLDS, shuffle=True, random_state=seed)
    folds = list(splitter.split(labels, labels, units))
    whole = all(len(np.unique(labels[side])) == len(classes) for fold in folds for side in fold)
    return folds if whole else [(everything, everything)]
