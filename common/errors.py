"""Every error of ours.

FederationError                what was expected, what came, what to do (three lines for a person)
├── ConfigError                a key of a TOML file, a flag or `--set`
├── DataError                  a hospital's images or tables; the message may name files: it stays local
├── ModelError                 a model that does not exist or cannot be trained here
│   └── BatchNormError         layers that couple patients
├── WireError                  a message or file that breaks the wire contract
│   └── SchemaError            another version of it (common.messages)
├── TrainingStopped            the deadline passed between two steps (client.training.plain)
├── EngineError                the simulation's engine cannot go on (simulations.engines.embedded)
├── Refusal                    a hospital's answer instead of an update
├── CheckpointError            a checkpoint that is missing, torn or altered
├── QuorumError                too few hospitals for too long
└── PrivacyError               nothing may be trained
    ├── BudgetError            the privacy budget does not allow it
    ├── PolicyError            the hospital's policy does not allow it
    ├── GuardError             a set-up that would void the guarantee
    └── LedgerError            the ledger is damaged, altered or in use
        └── DamagedLedgerError its files are not as they were written (client.ledger.records)

A hospital answers the server with a `RefusalCode` only; the text of an error never leaves it.
Bad arguments of a function are plain `ValueError`.
"""

from enum import StrEnum

LONGEST_PIECE = 200


def printable(text: object, *, most: int = LONGEST_PIECE) -> str:
    r"""Words from outside, fit for a terminal and one line of a log: at most `most` characters.

    Whatever is no visible character or space becomes '?': line ends, escape sequences, reversed writing.

    >>> printable("ok\x1b[2J\nforged")
    'ok?[2J?forged'
    """
    return "".join(character if character.isprintable() else "?" for character in str(text)[:most])


class RefusalCode(StrEnum):
    """Why a hospital did not train: the only words about it that leave the hospital."""

    BUDGET = "budget-spent"
    POLICY = "policy"
    NOT_PRIVATE = "non-private-training-not-allowed"
    SCHEMA = "wire-schema"
    WEIGHTS = "weights"
    MODEL = "model"
    STALE = "stale-round"
    CONFLICT = "round-already-answered-for-other-weights"
    DATA = "data"
    LEDGER = "ledger"
    LATE = "deadline-passed"
    CODE = "code-not-accepted"
    APPROVAL = "approval-pending"
    SELF_TEST = "self-test-failed"
    METRICS = "metrics-not-allowed"
    PAUSED = "paused"
    LEFT = "left"
    INTERNAL = "internal-error"


class FederationError(Exception):
    """A failure that a person can act on: what happened, why, what to do."""

    refusal = RefusalCode.INTERNAL

    def __init__(self, what: str, *, why: str = "", fix: str = "") -> None:
        self.what, self.why, self.fix = what, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        return "\n".join(line for line in (self.what, self.why, self.fix) if line)


class ConfigError(FederationError):
    """A setting is unknown, impossible or contradicts another one."""


class DataError(FederationError):
    """A hospital's images or tables cannot be used as they are."""

    refusal = RefusalCode.DATA


class ModelError(FederationError):
    """The model does not exist or does not fit the data."""

    refusal = RefusalCode.MODEL


class BatchNormError(ModelError):
    """Layers of the model mix patients in a batch, which no clipping can undo."""


class WireError(FederationError):
    """A message or file does not keep the wire contract."""

    refusal = RefusalCode.WEIGHTS


class CheckpointError(FederationError):
    """A checkpoint is missing, torn or altered."""


class QuorumError(FederationError):
    """Too few hospitals answered for too long."""


class PrivacyError(FederationError):
    """Training would break a privacy promise."""

    refusal = RefusalCode.POLICY


class BudgetError(PrivacyError):
    """The privacy budget does not allow this training."""

    refusal = RefusalCode.BUDGET


class PolicyError(PrivacyError):
    """The hospital's policy does not allow this training."""


class GuardError(PrivacyError):
    """The set-up would void the differential privacy guarantee."""


class LedgerError(PrivacyError):
    """The ledger is damaged, altered or in use."""

    refusal = RefusalCode.LEDGER


class Refusal(FederationError):  # noqa: N818 - it is an answer, not a defect
    """A hospital's answer to the server instead of an update; only `code` travels."""

    def __init__(self, code: RefusalCode, what: str = "", *, why: str = "", fix: str = "") -> None:
        super().__init__(what or f"refused: {code.value}", why=why, fix=fix)
        self.code = code
