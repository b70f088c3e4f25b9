"""Splits: who trains, validates and tests; a unit is always on one side with all its images."""

import hashlib
import hmac
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

TRAIN, VALIDATION, TEST = SPLITS = ("train", "validation", "test")
_NAMES = {
    TRAIN: ("train", "training", "tr"),
    VALIDATION: ("val", "valid", "validation", "dev"),
    TEST: ("test", "testing", "holdout"),
}
_SPLIT_OF = {name: split for split, names in _NAMES.items() for name in names}


def split_named(text: str) -> str | None:
    """The split that a folder, key or table cell names, or None."""
    return _SPLIT_OF.get(text.strip().casefold())


def splits_of_units(
    units: NDArray[np.int64], splits: Sequence[str], *, num_units: int
) -> tuple[tuple[str, ...], int]:
    """The one split of each unit, and how many units stood in several.

    A unit with one image in test goes to test with all of them, else with one in validation to validation:
    nothing that is trained on can be tested on. `splits` may be empty strings (no split named).
    """
    order = ("", TRAIN, VALIDATION, TEST)
    ranks = np.array([order.index(split) for split in splits], dtype=np.int64)
    highest = np.zeros(num_units, np.int64)
    lowest = np.full(num_units, len(order))
    np.maximum.at(highest, units, ranks)
    np.minimum.at(lowest, units, ranks)
    return tuple(order[rank] for rank in highest), int((highest > lowest).sum())


def split_key(site_key: bytes) -> bytes:
    """The site's secret that decides who validates, from the one that names its patients."""
    return hmac.new(site_key, b"train or validation", hashlib.sha256).digest()


def keyed_share(unit_id: str, key: bytes) -> float:
    """A number in [0, 1) that depends on the unit and the key only, so nobody changes side as data grow."""
    digest = hmac.new(key, unit_id.encode(), hashlib.sha256).digest()
    return int.from_bytes(digest[:6], "big") / 2**48


def keyed_choice(unit_ids: Sequence[str], *, share: float, key: bytes) -> NDArray[np.bool_]:
    """(units,) which units belong to a share of them, decided by `keyed_share`."""
    return np.array([keyed_share(unit_id, key) < share for unit_id in unit_ids], dtype=np.bool_)
