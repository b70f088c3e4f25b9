"""The wire contract on one page: what travels between the server and a hospital, and nothing else.

| exchange | server sends | hospital answers |
|---|---|---|
| `query.hello` | envelope | envelope, `hospital`: name, enrolled patients, versions |
| `train` | envelope, `arrays`: global weights, `request`: the public plan, `grid`: see below | envelope, `arrays`: weight delta, `metrics`: the white-listed scalars |
| `evaluate` | envelope, `arrays`: weights, `request`: the public plan | envelope, `counts`: noisy counts, `metrics`: what they cost |
| `query.closing` | envelope, `arrays`: final weights, `model`: model.json | envelope, `receipt`: hash of what was stored, release certificate |

A delta travels as float32 or, where the envelope's encoding says so, in whole numbers on the announced `grid`
(`common.quantisation`); weights always travel as float32.
With `train` and `evaluate` the server echoes the hospital's newest `ledger-receipt`, and an answer brings the next
one: bytes that only the hospital can read. Instead of an answer a hospital may send envelope + `refusal`: one
enumerated code.
"""  # noqa: E501

import math
import re
from dataclasses import dataclass
from typing import TypeVar

from flwr.app import ArrayRecord, ConfigRecord, Message, MetricRecord, RecordDict

from common.config import PublicPlan
from common.errors import ConfigError, RefusalCode, WireError
from common.quantisation import LARGEST_WEIGHT, Grid
from common.settings import from_flat, to_flat

Record = ArrayRecord | ConfigRecord | MetricRecord
_RUN_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_HASH = re.compile(r"([0-9a-f]{64})?")
_LARGEST, _LONGEST_WORD = 1_000_000, 64
R = TypeVar("R", ArrayRecord, ConfigRecord, MetricRecord)
F = TypeVar("F", str, int, bool)

SCHEMA_VERSION = 3
ENCODING_FLOAT32 = "float32"
ENCODINGS = {32: ENCODING_FLOAT32, 8: "int8-grid", 4: "int4-grid"}
"""How an update travels, by bits for each number."""

HELLO = "query.hello"
TRAIN = "train"
EVALUATE = "evaluate"
CLOSING = "query.closing"

ARRAYS, ENVELOPE, REQUEST, METRICS = "arrays", "envelope", "request", "metrics"
HOSPITAL, MODEL, RECEIPT, REFUSAL = "hospital", "model", "receipt", "refusal"
COUNTS, LEDGER_RECEIPT, GRID = "counts", "ledger-receipt", "grid"

NUM_EXAMPLES = "num-examples"
TRAINING_STARTED, TRAINING_ENDED = "training-started", "training-ended"
NOISE_MULTIPLIER, STEPS, EPSILON, DELTA = "noise-multiplier", "steps", "epsilon", "delta"
METRIC_WHITE_LIST = frozenset(
    {NUM_EXAMPLES, TRAINING_STARTED, TRAINING_ENDED, NOISE_MULTIPLIER, STEPS, EPSILON, DELTA}
)
"""Scalars that may leave a hospital: the enrolled (public) count, clock times, and the plan's own numbers."""
CONFUSION, SCORES = "confusion", "scores"
COUNTS_WHITE_LIST = frozenset({CONFUSION, SCORES})
"""Noised counts about validation patients that may leave a hospital (shapes: `common.evaluation`)."""
LARGEST_RECEIPT = 16_384
"""Bytes of a ledger receipt at most; every honest one has them all."""


@dataclass(frozen=True, kw_only=True)
class RoundKey:
    """What makes a round unique: a hospital answers one key with one update, ever."""

    run_id: str
    """The federation's own run id, not Flower's."""
    attempt: int
    """Raised by the operator to train a round again; each attempt is charged."""
    round_number: int
    """1-based."""
    model_hash: str
    """`parameters_sha256` of the global weights of this round."""

    def __str__(self) -> str:
        return f"{self.run_id}/{self.attempt}/{self.round_number}/{self.model_hash[:16]}"


@dataclass(frozen=True, kw_only=True)
class Envelope:
    """Heads every message; an answer repeats the envelope of what it answers."""

    key: RoundKey
    task: str = "classification"
    encoding: str = ENCODING_FLOAT32
    """One of ENCODINGS: how the update that is asked for travels."""
    masked: bool = False
    """Whether the arrays are masked for secure aggregation (not yet in use)."""
    schema_version: int = SCHEMA_VERSION

    def to_record(self) -> ConfigRecord:
        """Encode as Flower's record."""
        return ConfigRecord(
            {
                "schema-version": self.schema_version,
                "run-id": self.key.run_id,
                "attempt": self.key.attempt,
                "round": self.key.round_number,
                "model-hash": self.key.model_hash,
                "task": self.task,
                "encoding": self.encoding,
                "masked": self.masked,
            }
        )

    @classmethod
    def from_record(cls, content: RecordDict) -> "Envelope":
        """Read the envelope of a message; raises WireError when absent, misshapen or of another schema."""
        record = _record(content, ENVELOPE, ConfigRecord)
        version = record.get("schema-version")
        if version != SCHEMA_VERSION:
            raise SchemaError(
                f"the message has wire schema {str(version)[:20]}, this side speaks {SCHEMA_VERSION}",
                fix="install the same release of hospital-federation on both sides",
            )
        key = RoundKey(
            run_id=_field(record, "run-id", str),
            attempt=_field(record, "attempt", int),
            round_number=_field(record, "round", int),
            model_hash=_field(record, "model-hash", str),
        )
        if not (_RUN_ID.fullmatch(key.run_id) and _HASH.fullmatch(key.model_hash)):
            raise WireError("the envelope's run id or model hash is not of the agreed form")
        if max(len(_field(record, name, str)) for name in ("task", "encoding")) > _LONGEST_WORD:
            raise WireError("the envelope's task or encoding is too long")
        if not (0 <= key.attempt <= _LARGEST and 0 <= key.round_number <= _LARGEST):
            raise WireError("the envelope's attempt or round is out of range")
        return cls(
            key=key,
            task=_field(record, "task", str),
            encoding=_field(record, "encoding", str),
            masked=_field(record, "masked", bool),
        )


class SchemaError(WireError):
    """The other side speaks another version of the wire contract."""

    refusal = RefusalCode.SCHEMA


def plan_to_record(plan: PublicPlan) -> ConfigRecord:
    """Encode the public plan as Flower's record of scalars."""
    return ConfigRecord(dict(to_flat(plan)))


def plan_from_record(content: RecordDict) -> PublicPlan:
    """Read the public plan of a request; raises WireError when it is absent or impossible."""
    record = _record(content, REQUEST, ConfigRecord)
    try:
        return from_flat(PublicPlan, dict(record))
    except ConfigError as error:
        raise WireError("the server's plan cannot be used", why=error.why) from None
    except (ValueError, RecursionError):  # text that looks like a list and is none
        raise WireError("the server's plan cannot be read") from None


def grid_to_record(grid: Grid, *, weight: int) -> ConfigRecord:
    """Encode the grid of a round and one hospital's weight."""
    return ConfigRecord({"exponents": list(grid.exponents), "weight": weight})


def grid_from_record(content: RecordDict, *, bits: int, parameters: int) -> tuple[Grid, int]:
    """Read grid and weight of a request for an update of so many parameters.

    Raises WireError where spacings or weight are missing, too many, or none that make sense.
    """
    record = _record(content, GRID, ConfigRecord)
    exponents, weight = record.get("exponents"), record.get("weight")
    if not isinstance(exponents, list) or [type(e) for e in exponents] != [int] * parameters:
        raise WireError("the announced grid does not have one spacing for each parameter")
    if type(weight) is not int or not 1 <= weight <= LARGEST_WEIGHT:
        raise WireError("the announced weight is not a count of patients")
    try:
        return Grid(bits=bits, exponents=tuple(int(e) for e in exponents)), weight
    except ValueError as error:
        raise WireError("the announced grid has spacings that make no sense", why=str(error)[:200]) from None


def answer(request: Message, envelope: Envelope, **records: Record) -> Message:
    """Reply to `request` with the envelope and the named records."""
    return Message(RecordDict({ENVELOPE: envelope.to_record(), **records}), reply_to=request)


def refusal(request: Message, envelope: Envelope, code: RefusalCode) -> Message:
    """Reply to `request` with nothing but an enumerated reason."""
    return answer(request, envelope, **{REFUSAL: ConfigRecord({"code": code.value})})


def refusal_code(content: RecordDict) -> RefusalCode | None:
    """The reason of a refusal, INTERNAL for an unknown one, None when the message is no refusal."""
    if REFUSAL not in content:
        return None
    code = _record(content, REFUSAL, ConfigRecord).get("code")
    if isinstance(code, str) and code in set(RefusalCode):  # a list from a stranger has no hash
        return RefusalCode(code)
    return RefusalCode.INTERNAL


def arrays_of(content: RecordDict) -> ArrayRecord:
    """The arrays of a message; raises WireError when there are none."""
    return _record(content, ARRAYS, ArrayRecord)


def metrics_of(content: RecordDict) -> dict[str, float]:
    """The white-listed scalars of an answer, all finite; raises WireError for any other key or value."""
    record = _record(content, METRICS, MetricRecord)
    if unknown := sorted(set(record) - METRIC_WHITE_LIST):
        raise WireError("the answer holds scalars that are not on the white list", why=unknown[0][:80])
    try:
        values = {name: float(value) for name, value in record.items() if isinstance(value, int | float)}
    except OverflowError:  # an integer beyond every float
        values = {}
    if len(values) != len(record) or not all(math.isfinite(value) for value in values.values()):
        raise WireError("the answer holds scalars that are not finite numbers")
    return values


def receipt_record(ledger_receipt: bytes) -> dict[str, ConfigRecord]:
    """The record that carries a ledger receipt, either way; none for no receipt."""
    return {LEDGER_RECEIPT: ConfigRecord({"bytes": ledger_receipt})} if ledger_receipt else {}


def receipt_of(content: RecordDict) -> bytes:
    """The ledger receipt of a message, b"" where there is none; raises WireError for a misshapen one."""
    if LEDGER_RECEIPT not in content:
        return b""
    receipt = _record(content, LEDGER_RECEIPT, ConfigRecord).get("bytes")
    if not isinstance(receipt, bytes) or len(receipt) > LARGEST_RECEIPT:
        raise WireError("the ledger receipt is not of the agreed form")
    return receipt


def content_bytes(content: RecordDict) -> int:
    """Bytes of a message's records, as they travel without Flower's own headers."""
    return sum(bytes_of_record(record) for record in content.values())


def bytes_of_record(record: Record) -> int:
    """Bytes of a record: Flower's own count, which refuses a configuration with an empty text in it."""
    if not isinstance(record, ConfigRecord):
        return record.count_bytes()
    full = {name: value for name, value in record.items() if value not in ("", b"")}
    return ConfigRecord(full).count_bytes() + sum(len(name) for name in record if name not in full)


def _record(content: RecordDict, name: str, kind: type[R]) -> R:
    record = content.get(name)
    if not isinstance(record, kind):
        raise WireError(f"the message has no {name!r} record of type {kind.__name__}")
    return record


def _field(record: ConfigRecord, name: str, kind: type[F]) -> F:
    value = record.get(name)
    if type(value) is not kind:
        raise WireError(f"field {name!r} of the envelope is not of type {kind.__name__}")
    return value
