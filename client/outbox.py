"""Sealed answers: what was formed for a round key is kept until sent, and sent again byte for byte.

One safetensors file per round key, written atomically with mode 0600 in a folder with mode 0700.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from common.errors import LedgerError
from common.files import write_bytes_atomically
from common.messages import RoundKey
from common.parameters import Parameters, parameters_sha256

_KEPT_ROUNDS = 4


@dataclass(frozen=True, kw_only=True)
class SealedAnswer:
    """An update that has passed the door, and the scalars that go with it."""

    delta: Parameters
    metrics: dict[str, float | int]

    @property
    def sha256(self) -> str:
        """Hash of the update."""
        return parameters_sha256(self.delta)


class Outbox:
    """The folder of sealed answers of one hospital."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def seal(self, key: RoundKey, answer: SealedAnswer) -> None:
        """Store `answer` durably; from now on `key` has this answer and no other."""
        metadata = {
            "metrics": json.dumps(answer.metrics),
            "sha256": answer.sha256,
            "order": json.dumps(list(answer.delta)),
        }
        write_bytes_atomically(self._path(key), save(answer.delta, metadata=metadata), mode=0o600)
        self._forget_older_rounds(key)

    def find(self, key: RoundKey) -> SealedAnswer | None:
        """The sealed answer of `key`, None when there is none. Raises LedgerError when it was altered."""
        path = self._path(key)
        if not path.is_file():
            return None
        answer = _read(path)
        if answer is None:
            raise LedgerError(
                f"the sealed answer of round {key.round_number} was altered on disk",
                fix="restore the state folder from a backup; the round is charged and is not trained again",
            )
        return answer

    def _run_prefix(self, key: RoundKey) -> str:
        return hashlib.sha256(key.run_id.encode()).hexdigest()[:16]

    def _path(self, key: RoundKey) -> Path:
        identity = f"{key.run_id}\n{key.attempt}\n{key.round_number}\n{key.model_hash}"
        digest = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return self._folder / f"{self._run_prefix(key)}-{key.round_number:06d}-{digest}.safetensors"

    def _forget_older_rounds(self, key: RoundKey) -> None:
        # A server falls back by at most the checkpoints it keeps, so older answers are never asked for again.
        for path in self._folder.glob(f"{self._run_prefix(key)}-*.safetensors"):
            if int(path.name.split("-")[1]) <= key.round_number - _KEPT_ROUNDS:
                path.unlink(missing_ok=True)


def _read(path: Path) -> SealedAnswer | None:
    """The answer in a file, None when it is not as it was written."""
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata()
            delta = {name: file.get_tensor(name) for name in json.loads(metadata["order"])}
        answer = SealedAnswer(delta=delta, metrics=json.loads(metadata["metrics"]))
    except (SafetensorError, ValueError, KeyError, TypeError):
        return None
    return answer if answer.sha256 == metadata["sha256"] else None
