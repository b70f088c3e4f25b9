"""Score a run from outside: each new checkpoint while it trains, the final model with intervals.

The simulation watches the run folder and never hooks into the server. Nothing here decides anything about
the run: the final model is the last one, whatever its scores.
"""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import Any, Self

from common.config import FederationConfig
from common.errors import FederationError
from common.files import write_json_atomically
from simulations.engines.processes import start_process, stop_process
from simulations.ledgers import charged, collect_audit
from simulations.scoring_process import serve

EVALUATION, RESULT = "evaluation.json", "result.json"
_POLL_S = 0.1
_REST = 3.0
"""Rests this many times as long as the last scoring took, so that scoring takes a quarter at most."""


class Scoring:
    """A scoring process and the thread that feeds it; a context manager."""

    def __init__(
        self, config: FederationConfig, *, hospitals: list[str], held_back: Path, num_threads: int = 1
    ) -> None:
        self._folder = Path(config.runtime.run_folder)
        self._hospitals = hospitals
        self._process, self._connection = start_process(
            serve, (config, str(held_back), num_threads), name="scoring"
        )
        self._asking = threading.Lock()
        self._stop = threading.Event()
        self._watcher = threading.Thread(target=self._watch, name="scoring", daemon=True)
        self.points: list[dict[str, Any]] = _earlier_points(self._folder)
        """One line per scored round and split."""

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def make_initial_weights(self, path: Path) -> None:
        """Write the weights of round 0, quicker than a fresh interpreter would. Raises FederationError."""
        self._ask({"do": "initial-weights", "path": str(path)})

    def watch(self) -> None:
        """Score new checkpoints from now on, the newest first; rounds are skipped when training is faster."""
        self._watcher.start()

    def finish(self) -> dict[str, Any]:
        """Score the final model and write evaluation.json. Raises FederationError."""
        self._stop.set()
        if self._watcher.is_alive():
            self._watcher.join()
        self._score_checkpoint()
        model = self._folder / "model.safetensors"
        numbers = read_json(self._folder / "model.json")
        final = self._ask(
            {"do": "final", "path": str(model), "hospitals": self._hospitals, "numbers": numbers}
        )
        content = {
            "per_round": self.points,
            "test": final["splits"].get("test"),
            "validation": final["splits"].get("validation"),
            "hospitals": final["hospitals"],
            "worst_hospital": final["worst_hospital"],
        }
        write_json_atomically(self._folder / EVALUATION, content)
        return content

    def close(self) -> None:
        """End thread and process."""
        self._stop.set()
        if self._watcher.is_alive():
            self._watcher.join(timeout=5)
        stop_process(self._process, self._connection, patience_s=0.2)

    def _watch(self) -> None:
        while not self._stop.is_set():
            started = time.monotonic()
            try:
                scored = self._score_checkpoint()
            except (FederationError, OSError):
                return  # the final scoring says what is wrong
            took = time.monotonic() - started
            self._stop.wait(max(_POLL_S, _REST * took) if scored else _POLL_S)

    def _score_checkpoint(self) -> bool:
        """Score the newest checkpoint unless it is scored; whether it was done."""
        number = newest_checkpoint(self._folder)
        if number is None or any(point["round"] == number for point in self.points):
            return False
        try:
            checkpoint = self._folder / "checkpoints" / str(number)
            scores = self._ask({"do": "checkpoint", "path": str(checkpoint)})
        except FederationError:
            if checkpoint.exists():
                raise
            return False  # it made room for a newer one meanwhile
        self.points += [{"round": number, "split": split} | values for split, values in scores.items()]
        evaluation = read_json(self._folder / EVALUATION)
        write_json_atomically(self._folder / EVALUATION, evaluation | {"per_round": self.points})
        return True

    def _ask(self, request: Mapping[str, Any]) -> dict[str, Any]:
        with self._asking:
            try:
                self._connection.send_bytes(json.dumps(request).encode())
                answer: dict[str, Any] = json.loads(self._connection.recv_bytes())
            except (EOFError, OSError):
                raise FederationError(
                    "the process that scores the model has died",
                    why="it may have run out of memory",
                    fix="free memory and resume the run: training is kept",
                ) from None
        if "error" in answer:
            raise FederationError("the model cannot be scored", why=str(answer["error"]))
        return answer


def newest_checkpoint(folder: Path) -> int | None:
    """Number of the newest whole checkpoint in a run folder."""
    found = (folder / "checkpoints").glob("*/manifest.json")
    return max((int(path.parent.name) for path in found if path.parent.name.isdecimal()), default=None)


def complete_result(folder: Path, evaluation: Mapping[str, Any], *, engine: str) -> dict[str, Any]:
    """Fill scores, engine and what the ledgers say into result.json, which the server has written without."""
    result = read_json(folder / RESULT)
    result["engine"] = engine
    # `validation` is what the hospitals' noised counts say; the split's exact scores have their own name.
    for split, name in (("test", "test"), ("validation", "held_back_validation")):
        if scored := evaluation.get(split):
            result[name] = scored["metrics"] | {"ci95": scored["ci95"]}
            result[name] |= {key: scored[key] for key in ("at_operating_point", "subgroups") if key in scored}
    result["worst_hospital"] = evaluation.get("worst_hospital", {})
    result["time"] = result.get("time", {}) | times_of_rounds(_lines(folder / "metrics.jsonl"))
    for hospital in result.get("hospitals", []):
        hospital["test"] = evaluation["hospitals"].get(hospital["name"], {})
        if result.get("private"):
            hospital |= charged(folder, hospital["name"], result["run_id"])
            if not hospital.get("epsilon_outsider_proven"):  # then it is the same number, whatever it is
                hospital["epsilon_outsider"] = hospital["epsilon"]
    collect_audit(folder, [hospital["name"] for hospital in result.get("hospitals", [])])
    write_json_atomically(folder / RESULT, result)
    return result


def times_of_rounds(lines: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Seconds in which at least one hospital trained, over all rounds, and the median rest of a round.

    Simulated hospitals share the cores and train one after the other, so the slowest alone says too little.
    """
    trained_s, rests = 0.0, []
    of_round: dict[int, list[Mapping[str, Any]]] = {}
    for line in lines:
        if "hospital" in line:
            of_round.setdefault(line["round"], []).append(line)
    for closed in (line for line in lines if "closed" in line):
        mine = of_round.get(closed["round"], [])
        covered, end = 0.0, 0.0
        spans = sorted(
            (line["training_started"], line["training_ended"]) for line in mine if line["training_ended"]
        )
        for start, stop in spans:
            covered += max(0.0, stop - max(start, end))
            end = max(end, stop)
        began = min((line["sent"] for line in mine), default=closed["closed"])
        trained_s += covered
        rests.append(max(0.0, closed["closed"] - began - covered))
    return {"train_s": trained_s, "overhead_s_per_round": median(rests) if rests else 0.0}


def _lines(path: Path) -> list[dict[str, Any]]:
    from server.reporting.round_lines import metric_lines

    return [dict(line) for line in metric_lines(path)]


def _earlier_points(folder: Path) -> list[dict[str, Any]]:
    """Scores of rounds that a resumed run has kept; those after its checkpoint are trained again."""
    newest = newest_checkpoint(folder)
    points = read_json(folder / EVALUATION).get("per_round", [])
    return [point for point in points if newest is not None and point["round"] <= newest]


def read_json(path: Path) -> dict[str, Any]:
    """The object in a file of JSON; empty where there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}
