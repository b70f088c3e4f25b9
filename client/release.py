"""The only door out of a hospital.

Whatever leaves passes through one of these functions: an update that was made private and charged, the
hospital's public introduction, a receipt, or an enumerated refusal. Each is checked against the white list of
`common.messages` and written to the hospital's own `audit.jsonl`.
"""

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Message, MetricRecord

from client.outbox import SealedAnswer
from common import messages
from common.errors import PrivacyError, RefusalCode
from common.files import append_line
from common.messages import Envelope
from common.parameters import record_bytes, to_record

HELLO_WHITE_LIST = frozenset({"name", "enrolled-patients", "schema-version", "version", "flwr"})
"""What a hospital says of itself: nothing here depends on which patients it has."""


class Door:
    """Lets white-listed answers out and writes down each one."""

    def __init__(self, audit_file: Path) -> None:
        self._audit_file = audit_file

    def update(self, request: Message, envelope: Envelope, sealed: SealedAnswer) -> Message:
        """Answer with a sealed update: the weight delta and the white-listed scalars, nothing else."""
        if unknown := set(sealed.metrics) - messages.METRIC_WHITE_LIST:
            raise PrivacyError(f"{sorted(unknown)[0]} is not on the white list of what may leave")
        arrays = to_record(sealed.delta)
        self._note(envelope, "update", record_bytes(arrays), sealed.sha256, sealed.metrics)
        records: dict[str, messages.Record] = {
            messages.ARRAYS: arrays,
            messages.METRICS: MetricRecord(dict(sealed.metrics)),
        }
        return messages.answer(request, envelope, **records)

    def introduction(
        self, request: Message, envelope: Envelope, facts: dict[str, str | int | bool]
    ) -> Message:
        """Answer a hello with the hospital's public facts."""
        if set(facts) != HELLO_WHITE_LIST:
            raise PrivacyError("the introduction does not hold exactly the white-listed facts")
        self._note(envelope, "introduction", 0, "", {})
        return messages.answer(request, envelope, **{messages.HOSPITAL: ConfigRecord(dict(facts))})

    def receipt(self, request: Message, envelope: Envelope, model_sha256: str) -> Message:
        """Confirm which model was stored."""
        self._note(envelope, "receipt", 0, model_sha256, {})
        return messages.answer(
            request, envelope, **{messages.RECEIPT: ConfigRecord({"sha256": model_sha256})}
        )

    def refusal(self, request: Message, envelope: Envelope, code: RefusalCode) -> Message:
        """Answer with an enumerated reason and no local detail."""
        self._note(envelope, f"refusal {code.value}", 0, "", {})
        return messages.refusal(request, envelope, code)

    def _note(
        self, envelope: Envelope, what: str, num_bytes: int, sha256: str, metrics: dict[str, float | int]
    ) -> None:
        line = {
            "time": time.time(),
            "what": what,
            "run": envelope.key.run_id,
            "attempt": envelope.key.attempt,
            "round": envelope.key.round_number,
            "bytes": num_bytes,
            "sha256": sha256,
            "noise_multiplier": metrics.get(messages.NOISE_MULTIPLIER),
            "steps": metrics.get(messages.STEPS),
            "epsilon": metrics.get(messages.EPSILON),
        }
        append_line(self._audit_file, json.dumps(line), mode=0o600)
