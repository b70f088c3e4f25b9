"""The invented update of played hospitals: made by the one door out, and made each hospital's own."""

import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message

from client.outbox import SealedAnswer
from client.release import Door, encoded
from common import messages
from common.config import PublicPlan
from common.messages import Envelope, RoundKey
from common.parameters import Parameters, Template
from common.privacy.accountant import running_epsilon
from common.privacy.plan import PrivacyEvent
from common.privacy.randomness import SecureRandomness
from common.quantisation import Grid

NOISE_MULTIPLIER, UPDATE_DELTA = 2.0, 1e-3
_EVERY, _FIRST = 256 * 2**10, 128 * 2**10


@dataclass(kw_only=True)
class Update:
    """The one update of a round that all send; made when the first is asked for."""

    shapes: Template
    _records: dict[str, messages.Record] = field(default_factory=dict)
    _key: RoundKey | None = None
    _lock: threading.Lock = field(default_factory=threading.Lock)
    slots: threading.Semaphore = field(default_factory=lambda: threading.Semaphore(2))
    """Answers that are formed at once: forming one needs a whole update in memory, sending it a piece."""

    def records(self, request: Message, envelope: Envelope, *, enrolled: int) -> dict[str, messages.Record]:
        """What answers `request`, as the door lets it out."""
        with self._lock:
            if self._key != envelope.key:
                self._records, self._key = self._made(request, envelope, enrolled=enrolled), envelope.key
            return self._records

    def piece(self, entry: str, start: int, end: int) -> memoryview:
        """Bytes of the common update's encoded arrays."""
        for record in self._records.values():
            if isinstance(record, ArrayRecord) and entry in record:
                return memoryview(record[entry].data)[start:end]
        raise KeyError(entry)

    def _made(self, request: Message, envelope: Envelope, *, enrolled: int) -> dict[str, messages.Record]:
        plan = messages.plan_from_record(request.content)
        privacy = plan.privacy
        event = PrivacyEvent(
            sampling_rate=privacy.sampling_rate,
            noise_multiplier=NOISE_MULTIPLIER,
            steps=privacy.local_steps,
        )
        noise = NOISE_MULTIPLIER * privacy.l2_clip_norm / (privacy.sampling_rate * enrolled)
        metrics: dict[str, float | int] = {
            messages.NUM_EXAMPLES: enrolled,
            messages.TRAINING_STARTED: time.time(),
            messages.TRAINING_ENDED: time.time(),
            messages.NOISE_MULTIPLIER: NOISE_MULTIPLIER,
            messages.STEPS: privacy.local_steps,
            messages.EPSILON: 1.01 * running_epsilon([event] * envelope.key.round_number, delta=UPDATE_DELTA),
            messages.DELTA: UPDATE_DELTA,
        }
        delta = encoded(
            _noise(self.shapes, plan.training.learning_rate * noise),
            self._grid(request, envelope, plan),
            SecureRandomness(),
            round_number=envelope.key.round_number,
        )
        with tempfile.TemporaryDirectory() as folder:
            door = Door(Path(folder) / "audit.jsonl")
            answer = door.update(request, envelope, SealedAnswer(delta=delta, metrics=metrics))
        return {name: record for name, record in answer.content.items() if name != messages.ENVELOPE}

    def _grid(self, request: Message, envelope: Envelope, plan: PublicPlan) -> tuple[Grid, int] | None:
        if envelope.encoding == messages.ENCODING_FLOAT32:
            return None
        return messages.grid_from_record(request.content, bits=plan.wire.bits, parameters=len(self.shapes))


def _noise(shapes: Template, deviation: float) -> Parameters:
    generator = np.random.default_rng(0)
    return {
        name: np.float32(deviation) * generator.standard_normal(shape, dtype=np.float32)
        for name, shape in shapes.items()
    }


def mark(data: bytearray, start: int, *, number: int) -> None:
    """Make bytes of the encoded arrays from `start` on the hospital's own.

    The low bytes of two numbers in each 256 KiB: an honest number stays one, whatever the encoding.
    """
    first = start + (_FIRST - start) % _EVERY
    for place in range(first - start, len(data) - 4, _EVERY):
        data[place], data[place + 4] = number % 128, number // 128
