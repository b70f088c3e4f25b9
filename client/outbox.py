"""Sealed answers: what was formed for a round key is kept until sent, and sent again byte for byte.

One safetensors file per round key and purpose, written atomically with mode 0600 in a folder with mode 0700.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from client.ledger.records import TRAINING
from common.errors import LedgerError
from common.files import write_bytes_atomically
from common.messages import RoundKey
from common.parameters import parameters_sha256
from common.quantisation import Arrays

_KEPT_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class SealedAnswer:
    """What has passed the door: an update or noised counts, and the scalars that go with them."""

    delta: Arrays
    """As it travels: float32 by parameter, or whole numbers on the round's grid."""
    metrics: Mapping[str, float | int]
    counts: Mapping[str, list[float]] = field(default_factory=dict)
    """Noised counts about validation patients, in a fixed order; none with an update."""

    @cached_property
    def sha256(self) -> str:
        """Hash of the update alone, as whoever receives it can compute it."""
        return parameters_sha256(self.delta)

    @cached_property
    def digest(self) -> str:
        """Hash of everything in the answer: update, counts and scalars. The ledger notes this one."""
        return _digest(self.delta, _scalars(self))


class Outbox:
    """The folder of sealed answers of one hospital."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def seal(self, key: RoundKey, answer: SealedAnswer, *, purpose: str = TRAINING) -> None:
        """Store `answer` durably; from now on `key` has this answer and no other for this purpose."""
        metadata = {
            "scalars": _scalars(answer),
            "digest": answer.digest,
            "order": json.dumps(list(answer.delta)),
        }
        path = self._path(key, purpose)
        write_bytes_atomically(path, save(dict(answer.delta), metadata=metadata), mode=0o600)
        self._forget_older_rounds(key)

    def find(self, key: RoundKey, *, purpose: str = TRAINING) -> SealedAnswer | None:
        """The sealed answer of `key`, None when there is none. Raises LedgerError when it was altered."""
        path = self._path(key, purpose)
        if not path.is_file():
            return None
        answer = _read(path)
        if answer is None:
            raise LedgerError(
                f"the sealed answer of round {key.round_number} was altered on disk",
                fix="restore the state folder from a backup; the round is charged and is not trained again",
            )
        return answer

    def _path(self, key: RoundKey, purpose: str) -> Path:
        identity = f"{key.run_id}\n{key.attempt}\n{key.round_number}\n{key.model_hash}\n{purpose}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self._folder / f"{run_prefix(key.run_id)}-{key.round_number:06d}-{digest}.safetensors"

    def _forget_older_rounds(self, key: RoundKey) -> None:
        # A server falls back by at most the checkpoints it keeps, so older answers are never asked for again.
        for path in self._folder.glob(f"{run_prefix(key.run_id)}-*.safetensors"):
            if int(path.name.split("-")[1]) <= key.round_number - _KEPT_ROUNDS:
                path.unlink(missing_ok=True)


def run_prefix(run_id: str) -> str:
    """How the files of a run's answers begin."""
    return hashlib.sha256(run_id.encode()).hexdigest()[:16]


def _scalars(answer: SealedAnswer) -> str:
    return json.dumps({"metrics": dict(answer.metrics), "counts": dict(answer.counts)}, sort_keys=True)


def _digest(delta: Arrays, scalars: str) -> str:
    return hashlib.sha256(f"{parameters_sha256(delta)}\n{scalars}".encode()).hexdigest()


def _read(path: Path) -> SealedAnswer | None:
    """The answer in a file, None when it is not as it was written."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            delta = {name: file.get_tensor(name) for name in json.loads(metadata["order"])}
        scalars = metadata["scalars"]
        if _digest(delta, scalars) != metadata["digest"]:
            return None
        return SealedAnswer(delta=delta, **json.loads(scalars))
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
