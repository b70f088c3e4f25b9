"""The only door out of a hospital.

Whatever leaves passes through one of these functions: an update that was made private and charged, noised and
charged counts about validation patients, the hospital's public introduction, a receipt, or an enumerated
refusal. Each is checked against the white list of `common.messages` and written to the hospital's own
`audit.jsonl`: what, when, to whom, bytes, hash, cost.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
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

    def __init__(self, audit_file: Path, *, recipient: str = "") -> None:
        self._audit_file = audit_file
        self._recipient = recipient

    def update(
        self, request: Message, envelope: Envelope, sealed: SealedAnswer, *, ledger_receipt: bytes = b""
    ) -> Message:
        """Answer with a sealed update: the weight delta and the white-listed scalars, nothing else.

        `ledger_receipt` is encrypted for this hospital alone (`client.ledger.receipts`).
        """
        _require_listed(sealed.metrics)
        arrays = to_record(sealed.delta)
        self._note(envelope, "update", record_bytes(arrays), sealed.sha256, sealed.metrics)
        records: dict[str, messages.Record] = {
            messages.ARRAYS: arrays,
            messages.METRICS: MetricRecord(dict(sealed.metrics)),
        }
        return messages.answer(request, envelope, **records, **messages.receipt_record(ledger_receipt))

    def evaluation(
        self,
        request: Message,
        envelope: Envelope,
        counts: Mapping[str, list[float]],
        metrics: Mapping[str, float | int],
        *,
        ledger_receipt: bytes = b"",
    ) -> Message:
        """Answer with noised, charged counts about validation patients and what they cost."""
        _require_listed(metrics)
        if unknown := set(counts) - messages.COUNTS_WHITE_LIST:
            raise PrivacyError(f"{sorted(unknown)[0]} is not on the white list of what may leave")
        if not all(math.isfinite(count) for values in counts.values() for count in values):
            raise PrivacyError("a count that is not finite does not leave")
        text = json.dumps({name: list(values) for name, values in sorted(counts.items())})
        sha256 = hashlib.sha256(text.encode()).hexdigest()
        self._note(envelope, "evaluation", 8 * sum(map(len, counts.values())), sha256, metrics)
        records: dict[str, messages.Record] = {
            messages.COUNTS: MetricRecord({name: list(values) for name, values in counts.items()}),
            messages.METRICS: MetricRecord(dict(metrics)),
        }
        return messages.answer(request, envelope, **records, **messages.receipt_record(ledger_receipt))

    def introduction(
        self, request: Message, envelope: Envelope, facts: dict[str, str | int | bool]
    ) -> Message:
        """Answer a hello with the hospital's public facts."""
        if set(facts) != HELLO_WHITE_LIST:
            raise PrivacyError("the introduction does not hold exactly the white-listed facts")
        self._note(envelope, "introduction", 0, "", {})
        return messages.answer(request, envelope, **{messages.HOSPITAL: ConfigRecord(dict(facts))})

    def receipt(
        self, request: Message, envelope: Envelope, model_sha256: str, *, certificate: str = ""
    ) -> Message:
        """Confirm which model was stored, with the hospital's signed release certificate if there is one."""
        self._note(envelope, "receipt", len(certificate), model_sha256, {})
        record = ConfigRecord({"sha256": model_sha256, "certificate": certificate})
        return messages.answer(request, envelope, **{messages.RECEIPT: record})

    def refusal(self, request: Message, envelope: Envelope, code: RefusalCode) -> Message:
        """Answer with an enumerated reason and no local detail."""
        self._note(envelope, f"refusal {code.value}", 0, "", {})
        return messages.refusal(request, envelope, code)

    def _note(
        self, envelope: Envelope, what: str, num_bytes: int, sha256: str, metrics: Mapping[str, float | int]
    ) -> None:
        line = {
            "time": time.time(),
            "what": what,
            "to": self._recipient,
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


def _require_listed(metrics: Mapping[str, float | int]) -> None:
    if unknown := set(metrics) - messages.METRIC_WHITE_LIST:
        raise PrivacyError(f"{sorted(unknown)[0]} is not on the white list of what may leave")
