"""The only door out of a hospital.

Whatever leaves passes through one of these functions: an update that was made private and charged, noised and
charged counts about validation patients, the hospital's public introduction, a receipt, or an enumerated
refusal. Each is checked against the white list of `common.messages` and written to the hospital's own
`audit.jsonl` before it leaves: what, when, to whom, which records, bytes and hash of all of them, cost.
"""

import hashlib
import json
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flwr.app import Array, ConfigRecord, Message, MetricRecord, RecordDict

from client.ledger.records import EVALUATION, TRAINING
from client.outbox import SealedAnswer
from common import messages
from common.errors import PrivacyError, Refusal, RefusalCode
from common.files import append_line
from common.messages import Envelope
from common.parameters import Parameters, to_record
from common.privacy.randomness import RandomnessSource
from common.quantisation import Arrays, Grid, is_quantised, quantised

HELLO_WHITE_LIST = frozenset({"name", "enrolled-patients", "schema-version", "version", "flwr"})
"""What a hospital says of itself: nothing here depends on which patients it has."""


def encoded(
    delta: Parameters, grid: tuple[Grid, int] | None, randomness: RandomnessSource, *, round_number: int
) -> Arrays:
    """The update as it will travel: rounded on the announced grid, with the announced weight; or as it is.

    `delta` is what private training gave, after its noise; nothing here looks at anything else
    (post-processing). It is sealed after this, so an answer that is sent again has the same bytes.
    """
    if grid is None:
        return dict(delta)
    stream = randomness.stream(purpose="rounding", round_number=round_number, step=0)
    return quantised(delta, grid=grid[0], weight=grid[1], stream=stream)


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
        if is_quantised(sealed.delta) != (envelope.encoding != messages.ENCODING_FLOAT32):
            raise Refusal(
                RefusalCode.CONFLICT,
                f"round {envelope.key.round_number} was answered in another encoding than is asked for now",
                why="a round has one answer, and it is sent again byte for byte",
                fix="ask again as the first time, or let the server open a new attempt, which is charged",
            )
        records: dict[str, messages.Record] = {
            messages.ARRAYS: to_record(sealed.delta),
            messages.METRICS: MetricRecord(dict(sealed.metrics)),
        }
        message = messages.answer(request, envelope, **records, **messages.receipt_record(ledger_receipt))
        return self._noted("update", envelope, message, sealed_sha256=sealed.sha256)

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
        records: dict[str, messages.Record] = {
            messages.COUNTS: MetricRecord({name: list(values) for name, values in counts.items()}),
            messages.METRICS: MetricRecord(dict(metrics)),
        }
        message = messages.answer(request, envelope, **records, **messages.receipt_record(ledger_receipt))
        return self._noted("evaluation", envelope, message)

    def introduction(
        self, request: Message, envelope: Envelope, facts: dict[str, str | int | bool]
    ) -> Message:
        """Answer a hello with the hospital's public facts."""
        if set(facts) != HELLO_WHITE_LIST:
            raise PrivacyError("the introduction does not hold exactly the white-listed facts")
        message = messages.answer(request, envelope, **{messages.HOSPITAL: ConfigRecord(dict(facts))})
        return self._noted("introduction", envelope, message)

    def receipt(
        self, request: Message, envelope: Envelope, model_sha256: str, *, certificate: str = ""
    ) -> Message:
        """Confirm which model was stored, with the hospital's signed release certificate if there is one."""
        record = ConfigRecord({"sha256": model_sha256, "certificate": certificate})
        message = messages.answer(request, envelope, **{messages.RECEIPT: record})
        return self._noted(
            "receipt",
            envelope,
            message,
            model_sha256=model_sha256,
            certificate_sha256=hashlib.sha256(certificate.encode()).hexdigest() if certificate else "",
        )

    def refusal(self, request: Message, envelope: Envelope, code: RefusalCode) -> Message:
        """Answer with an enumerated reason and no local detail."""
        message = messages.refusal(request, envelope, code)
        return self._noted(f"refusal {code.value}", envelope, message)

    def _noted(self, what: str, envelope: Envelope, message: Message, **hashes: str) -> Message:
        """Write down what `message` holds, then hand it on: what cannot be written down does not leave.

        Every number of the line is taken from the message itself. Raises OSError where the disk does not
        take the whole line.
        """
        content = message.content
        scalars = content.get(messages.METRICS)
        metrics: Mapping[str, Any] = scalars if isinstance(scalars, MetricRecord) else {}
        line = {
            "time": time.time(),
            "what": what,
            "to": self._recipient,
            "run": envelope.key.run_id,
            "attempt": envelope.key.attempt,
            "round": envelope.key.round_number,
            "bytes": messages.content_bytes(content),
            "sha256": content_sha256(content),
            **hashes,
            "records": {name: _described(record) for name, record in content.items()},
            "noise_multiplier": metrics.get(messages.NOISE_MULTIPLIER),
            "steps": metrics.get(messages.STEPS),
            "epsilon": metrics.get(messages.EPSILON),
            "cost": None,
        }
        if messages.EPSILON in metrics:
            line["cost"] = {
                "epsilon": metrics[messages.EPSILON],
                "delta": metrics.get(messages.DELTA),
                "purpose": EVALUATION if messages.COUNTS in content else TRAINING,
            }
        append_line(self._audit_file, json.dumps(line), mode=0o600)
        return message


def content_sha256(content: RecordDict) -> str:
    """SHA-256 over all that a message says: one line of JSON for each of its records, by name.

    A line is [record, {key: value}], keys sorted; bytes and arrays stand as their own SHA-256 and length.
    """
    digest = hashlib.sha256()
    for name in sorted(content):
        values = {key: _plain(value) for key, value in content[name].items()}
        digest.update(json.dumps([name, values], sort_keys=True).encode() + b"\n")
    return digest.hexdigest()


def _plain(value: object) -> object:
    data = value.data if isinstance(value, Array) else value
    return [hashlib.sha256(data).hexdigest(), len(data)] if isinstance(data, bytes) else data


def _described(record: messages.Record) -> dict[str, object]:
    """Bytes of a record, the names in it, and the lengths of lists among them."""
    lengths = {name: len(value) for name, value in record.items() if isinstance(value, list)}
    return {"bytes": messages.bytes_of_record(record), "names": sorted(record)} | (
        {"lengths": lengths} if lengths else {}
    )


def _require_listed(metrics: Mapping[str, float | int]) -> None:
    if unknown := set(metrics) - messages.METRIC_WHITE_LIST:
        raise PrivacyError(f"{sorted(unknown)[0]} is not on the white list of what may leave")
