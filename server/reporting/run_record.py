"""What a run folder says about its run: read once, aggregates only, for the report, the card and `status`.

Every part may be missing (a run that is still going, a real federation without a test split): the record
then holds None or nothing, and the pages say so instead of inventing a number.
"""

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from common.config import FederationConfig
from common.errors import ConfigError
from common.settings import parse
from server.reporting.round_lines import ClosedRound, Reply, closed_round_of, metric_lines, number, reply_of

CONFIG, RESULT, METRICS, EVALUATION = "config.toml", "result.json", "metrics.jsonl", "evaluation.json"
STOP = "stop"
UNFINISHED = "unfinished"
"""Status of a run that has left no result: it is going on, or it was killed."""
FINISHED = ("completed", "budget-exhausted")
"""Status of a run in which there is nothing left to train."""


@dataclass(frozen=True, kw_only=True)
class HospitalSummary:
    """One row of the table of hospitals; public or plan numbers only."""

    name: str
    enrolled_patients: int | None
    epsilon: float | None
    delta: float | None
    noise_multiplier: float | None
    sample_rate: float | None
    steps: int | None
    rounds: int | None
    releases: int | None
    """Updates that reached the server, aggregated or not."""
    epsilon_complete: bool
    """False when it may have charged for an update that the server never received or could not read."""
    epsilon_understated: bool
    """True when it stated less than its updates cost; then `epsilon` is that of `server.recount`."""
    epsilon_outsider: float | None
    """Against somebody who sees the final model only (`server.outsider`)."""
    epsilon_outsider_proven: bool
    """Whether it was derived for this run; else it is `epsilon` again."""
    epsilon_outsider_reason: str
    """Why it is smaller, or why it is not."""
    budget: float | None
    """Epsilon that the hospital's policy allows; known in simulations only."""

    @property
    def epsilon_outsider_complete(self) -> bool:
        """Whether it covers all that is in the final model."""
        return self.epsilon_outsider_proven or self.epsilon_complete


@dataclass(frozen=True, kw_only=True)
class RunRecord:
    """A run as its folder tells it."""

    folder: Path
    config: FederationConfig | None
    result: Mapping[str, Any]
    evaluation: Mapping[str, Any]
    replies: tuple[Reply, ...]
    rounds: tuple[ClosedRound, ...]
    hospitals: tuple[HospitalSummary, ...]

    @property
    def run_id(self) -> str:
        """The federation's own id of this run."""
        return str(self.result.get("run_id") or self.folder.name)

    @property
    def status(self) -> str:
        """Status of `result.json`, or `unfinished` as long as there is none."""
        return str(self.result.get("status") or UNFINISHED)

    @property
    def private(self) -> bool:
        """Whether the run claims differential privacy; a reproducible run never does."""
        if self.config is not None and not self.config.claims_privacy:
            return False
        return bool(self.result.get("private", self.config is not None))

    @property
    def reproducible(self) -> bool:
        """Whether noise came from the seed, which makes it no protection."""
        return self.config is not None and self.config.federation.reproducible

    @property
    def data(self) -> Mapping[str, Any]:
        """Name, task, classes and unit of the data."""
        return _mapping(self.result.get("data"))

    @property
    def data_name(self) -> str:
        """Name of the data, or of the study where the result does not name the data."""
        named = self.data.get("name")
        return str(named or (self.config.federation.name if self.config else self.run_id))

    @property
    def generated(self) -> bool:
        """Whether the images were made by a program and show nobody."""
        return bool(self.data.get("generated")) or "phantom" in self.data_name.lower()

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names in label order."""
        named = self.data.get("classes") or (self.config.data.classes if self.config else ())
        return tuple(str(name) for name in named)

    @property
    def unit(self) -> str:
        """Who is protected: patient or image."""
        return str(self.data.get("unit") or (self.config.data.unit if self.config else "patient"))

    @property
    def model(self) -> Mapping[str, Any]:
        """Name, number of parameters and hash of the model."""
        return _mapping(self.result.get("model"))

    @property
    def test(self) -> Mapping[str, Any]:
        """The evaluation on the held-back test split: metrics, ci95, roc, calibration, ece, confusion."""
        return _mapping(self.evaluation.get("test"))

    @property
    def test_metrics(self) -> Mapping[str, Any]:
        """Metrics on the test split; empty where nobody scored one."""
        return _mapping(self.test.get("metrics")) or {
            name: value for name, value in _mapping(self.result.get("test")).items() if name != "ci95"
        }

    @property
    def test_intervals(self) -> Mapping[str, Any]:
        """95 % intervals of the test metrics."""
        return _mapping(self.test.get("ci95")) or _mapping(_mapping(self.result.get("test")).get("ci95"))

    @property
    def validation(self) -> Mapping[str, Any]:
        """Scores from noised counts that hospitals have released; empty where there are none."""
        block = _mapping(self.result.get("validation"))
        return block if "noise" in block else {}

    @property
    def learning_curve(self) -> list[Mapping[str, Any]]:
        """Scores of the checkpoints, one mapping per scored round and split, in round order."""
        points = [_mapping(point) for point in self.evaluation.get("per_round") or ()]
        return sorted((p for p in points if isinstance(p.get("round"), int)), key=lambda p: int(p["round"]))

    @property
    def epsilon_max(self) -> float | None:
        """Largest epsilon received; None where none is claimed or a hospital that trained did not say it.

        A bound on the run's cost only where `epsilon_incomplete` is empty.
        """
        trained = [h for h in self.hospitals if h.rounds or h.releases or h.epsilon is not None]
        spent = [h.epsilon for h in trained if h.epsilon is not None]
        return max(spent) if self.private and spent and len(spent) == len(trained) else None

    @property
    def epsilon_incomplete(self) -> tuple[str, ...]:
        """Hospitals that may have charged more than the server knows; empty where nothing is claimed."""
        return tuple(h.name for h in self.hospitals if not h.epsilon_complete) if self.private else ()

    @property
    def outsider_max(self) -> float | None:
        """Largest epsilon against an outsider; None unless it is known for every hospital that trained."""
        trained = [h for h in self.hospitals if h.rounds or h.releases or h.epsilon is not None]
        known = [h.epsilon_outsider for h in trained if h.epsilon_outsider is not None]
        return max(known) if self.private and known and len(known) == len(trained) else None

    @property
    def delta_max(self) -> float | None:
        """Largest delta over the hospitals."""
        return max((h.delta for h in self.hospitals if h.delta is not None), default=None)

    @property
    def started(self) -> float | None:
        """When the first message of a round went out."""
        return min((r.sent for r in self.replies if r.sent is not None), default=None)

    @property
    def ended(self) -> float | None:
        """When the last round closed."""
        return max((r.closed for r in self.rounds), default=None)

    @cached_property
    def participation(self) -> Mapping[tuple[str, int], Reply]:
        """The reply that counts for each hospital and round: the one of the last attempt."""
        latest: dict[tuple[str, int], Reply] = {}
        for reply in self.replies:
            key = (reply.hospital, reply.round_number)
            if key not in latest or latest[key].attempt <= reply.attempt:
                latest[key] = reply
        return latest


def read_run(folder: Path) -> RunRecord:
    """Read the run folder; raises ConfigError when it is none."""
    if not (folder / CONFIG).is_file() and not (folder / RESULT).is_file():
        raise ConfigError(
            f"{folder} is not the folder of a run",
            why=f"it holds neither {CONFIG} nor {RESULT}",
            fix="name a folder that a run has written, for example runs/<run-id>",
        )
    config, result = read_config(folder / CONFIG), read_object(folder / RESULT)
    lines = metric_lines(folder / METRICS)
    replies = tuple(reply_of(line) for line in lines if "hospital" in line)
    return RunRecord(
        folder=folder,
        config=config,
        result=result,
        evaluation=read_object(folder / EVALUATION),
        replies=replies,
        rounds=tuple(closed_round_of(line) for line in lines if "closed" in line),
        hospitals=_hospitals(folder, result, replies),
    )


def read_config(path: Path) -> FederationConfig | None:
    """The federation's configuration, None where there is no file; sections of other programs are ignored."""
    if not path.is_file():
        return None
    try:
        values = tomllib.loads(path.read_text())
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML", why=str(error), fix="restore it") from None
    own = {section: values[section] for section in FederationConfig.model_fields if section in values}
    return parse(FederationConfig, own, source=str(path))


def read_object(path: Path) -> Mapping[str, Any]:
    """The JSON object in a file, empty where there is no file; raises ConfigError for a broken one."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON", why=str(error), fix="restore or delete it") from None
    return _mapping(content)


def hospital_settings(folder: Path, name: str) -> tuple[int | None, float | None]:
    """Enrolled patients and epsilon budget of a simulated hospital; (None, None) elsewhere."""
    path = folder / "hospitals" / name / "hospital.toml"
    if Path(name).name != name:  # a name from a file is no path
        return None, None
    try:
        values = tomllib.loads(path.read_text())
    except (OSError, ValueError):
        return None, None
    enrolled = number(_mapping(values.get("hospital")).get("enrolled-patients"))
    budget = number(_mapping(values.get("policy")).get("epsilon"))
    return None if enrolled is None else int(enrolled), budget


def _hospitals(
    folder: Path, result: Mapping[str, Any], replies: tuple[Reply, ...]
) -> tuple[HospitalSummary, ...]:
    entries = [_mapping(entry) for entry in result.get("hospitals") or ()]
    named = {str(entry.get("name")) for entry in entries}
    entries += [{"name": name} for name in dict.fromkeys(r.hospital for r in replies) if name not in named]
    return tuple(_hospital(folder, entry) for entry in entries)


def _hospital(folder: Path, entry: Mapping[str, Any]) -> HospitalSummary:
    name = str(entry.get("name"))
    enrolled, budget = hospital_settings(folder, name)
    steps, rounds = number(entry.get("steps")), number(entry.get("rounds"))
    releases = number(entry.get("releases"))
    listed = number(entry.get("enrolled_patients"))
    return HospitalSummary(
        name=name,
        enrolled_patients=enrolled if listed is None else int(listed),
        epsilon=number(entry.get("epsilon")),
        delta=number(entry.get("delta")),
        noise_multiplier=number(entry.get("noise_multiplier")),
        sample_rate=number(entry.get("sample_rate")),
        steps=None if steps is None else int(steps),
        rounds=None if rounds is None else int(rounds),
        releases=None if releases is None else int(releases),
        epsilon_complete=entry.get("epsilon_complete") is not False,
        epsilon_understated=entry.get("epsilon_understated") is True,
        epsilon_outsider=number(entry.get("epsilon_outsider")),
        epsilon_outsider_proven=entry.get("epsilon_outsider_proven") is True,
        epsilon_outsider_reason=str(entry.get("epsilon_outsider_reason") or ""),
        budget=budget,
    )


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, dict) else {}
