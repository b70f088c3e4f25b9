"""Run a scenario: prepare, start the engine, let the ServerApp train, score from outside, report.

outcome = run_scenario(make_scenario({"hospitals": 3, "epsilon": 8.0}))
outcome.result["test"]["auc"]
"""

import contextlib
import json
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from common.config import FederationConfig
from common.errors import ConfigError, FederationError
from common.exit_codes import ExitCode, exit_code_of
from common.settings import load, to_flat
from simulations.engines.processes import abandon, warm_up
from simulations.preparation import (
    HELD_BACK,
    SCENARIO,
    Prepared,
    prepare,
    relocate,
    roster,
    with_folder,
)
from simulations.scenario import Scenario
from simulations.scoring import Scoring, complete_result, newest_checkpoint

INITIAL_WEIGHTS, STOP = "initial.safetensors", "stop"
_MOST_LINES = 20
_SHOWN = ("auc", "accuracy", "recall", "f1", "quadratic_kappa", "mae", "exact_match")
"""Hospitals that have a line of their own."""
Say = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a run has left."""

    folder: Path
    result: dict[str, Any]
    """result.json, scores included."""
    evaluation: dict[str, Any]
    report: Path | None

    @property
    def status(self) -> str:
        """completed, stopped, quorum-lost, budget-exhausted or failed."""
        return str(self.result.get("status", "failed"))

    @property
    def exit_code(self) -> ExitCode:
        """The status for the shell."""
        return exit_code_of(self.status)


def run_scenario(scenario: Scenario, *, quiet: bool = True, say: Say | None = None) -> Outcome:
    """Prepare a scenario's run folder and train in it. Raises FederationError.

    `quiet` shows no live table; `say` gets the lines for a person before and after.
    """
    # The heavy imports run in the fork server while images are read here.
    warm_up()
    try:
        prepared = prepare(scenario)
    except BaseException:
        abandon()
        raise
    for line in describe(prepared, scenario):
        (say or _nothing)(line)
    return train_in(prepared.folder, prepared.config, scenario, quiet=quiet, say=say or _nothing)


def resume_run(folder: Path, *, quiet: bool = True, say: Say | None = None) -> Outcome:
    """Go on from the newest checkpoint of a run folder, with its own settings. Raises FederationError."""
    folder = folder.absolute()
    names = roster(folder)
    scenario = load(Scenario, folder / SCENARIO)
    with contextlib.suppress(OSError, ValueError):
        if json.loads((folder / "result.json").read_text()).get("status") == "completed":
            raise ConfigError(
                f"the run in {folder} is complete",
                why="all of its rounds are done",
                fix="start a new one with flower-simulate run",
            )
    warm_up()
    relocate(folder)
    config = with_folder(load(FederationConfig, folder / "config.toml"), folder, num_hospitals=len(names))
    done = newest_checkpoint(folder)
    (say or _nothing)(f"resuming {folder} after round {done or 0} of {config.federation.rounds}")
    return train_in(folder, config, scenario, quiet=quiet, say=say or _nothing)


def train_in(folder: Path, config: FederationConfig, scenario: Scenario, *, quiet: bool, say: Say) -> Outcome:
    """Train a prepared run folder to its end, score it, write the report."""
    from simulations.view import follow

    names = roster(folder)
    for left_over in (STOP, "result.json"):
        (folder / left_over).unlink(missing_ok=True)
    weights = None if newest_checkpoint(folder) is not None else folder / INITIAL_WEIGHTS
    if weights is not None:
        runtime = config.runtime.model_copy(update={"initial_weights": str(weights)})
        config = config.model_copy(update={"runtime": runtime})
    # What the server needs is imported here while the fork server imports what hospitals need.
    run_engine = engine_named(scenario.engine)
    with Scoring(config, hospitals=names, held_back=folder / HELD_BACK) as scoring:

        def get_ready() -> None:
            if weights is not None:
                scoring.make_initial_weights(weights)
            scoring.watch()

        with clean_stop(folder, say), follow(folder, total_rounds=config.federation.rounds, quiet=quiet):
            run_engine(config, names, get_ready)
        evaluation = scoring.finish()
    result = complete_result(folder, evaluation, engine=scenario.engine)
    report = write_report(folder)
    for line in conclusion(folder, result, report):
        say(line)
    return Outcome(folder=folder, result=result, evaluation=evaluation, report=report)


Engine = Callable[[FederationConfig, Sequence[str], Callable[[], None]], None]
"""Runs the two apps until the ServerApp ends; calls the last argument before the ServerApp begins."""


def engine_named(name: str) -> Engine:
    """The engine of a scenario, with all that this process has to import for it."""
    if name == "ray":
        from simulations.engines.ray_engine import run_on_ray

        def on_ray(config: FederationConfig, hospitals: Sequence[str], get_ready: Callable[[], None]) -> None:
            get_ready()
            run_on_ray(config, num_hospitals=len(hospitals))

        return on_ray
    if name == "processes":
        from simulations.engines.rehearsal import run_in_processes

        def rehearsed(
            config: FederationConfig, hospitals: Sequence[str], get_ready: Callable[[], None]
        ) -> None:
            get_ready()
            run_in_processes(config, hospitals=hospitals)

        return rehearsed
    from server.app import app
    from simulations.engines.embedded import open_grid, run_server_app

    def embedded(config: FederationConfig, hospitals: Sequence[str], get_ready: Callable[[], None]) -> None:
        logging.getLogger("flwr").setLevel(logging.WARNING)
        settings = to_flat(config)
        reproducible = config.federation.reproducible
        with open_grid(settings, num_hospitals=len(hospitals), reproducible=reproducible) as grid:
            get_ready()
            run_server_app(app, grid, settings)

    return embedded


def write_report(folder: Path) -> Path:
    """Write report, plots and model card."""
    from server.reporting.report import write_report as write

    return write(folder)


@contextlib.contextmanager
def clean_stop(folder: Path, say: Say) -> Iterator[None]:
    """Ctrl-C (or SIGTERM) asks the server to stop in order; a second one ends everything."""
    if threading.current_thread() is not threading.main_thread():
        yield  # only the main thread may handle signals
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if (folder / STOP).exists():
            raise KeyboardInterrupt
        (folder / STOP).touch()
        say(f"stopping; a second Ctrl-C ends at once. Later: flower-simulate resume {folder}")

    before = {name: signal.signal(name, ask) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for name, handler in before.items():
            signal.signal(name, handler)


def describe(prepared: Prepared, scenario: Scenario) -> list[str]:
    """What was chosen, for a person, before training starts."""
    config, facts = prepared.config, prepared.facts
    kind = "colour" if facts.channels == 3 else "grey"
    if config.federation.reproducible:
        privacy = "REPRODUCIBLE: sampling and noise come from the seed, so this run claims NO privacy"
    elif config.federation.private:
        budget = scenario.epsilon or config_epsilon()
        privacy = f"differential privacy per {facts.unit}: epsilon at most {budget:g} in each hospital"
    else:
        privacy = "NOT PRIVATE: no differential privacy, as asked for"
    scored = " and ".join(f"{name} {len(s.targets)} images" for name, s in prepared.held_back.sets.items())
    by = "as the data name it" if prepared.held_back.is_named else "drawn by patient"
    return [
        f"data      {facts.name}: {facts.image_size} px {kind}, classes {', '.join(facts.classes)}",
        *(f"          {note}" for note in prepared.notes),
        f"held back {scored} ({by})",
        f"hospitals {len(prepared.hospitals)} ({scenario.partition or 'by default'}): "
        + ", ".join(f"{h.name} {h.patients}" for h in prepared.hospitals[:8])
        + (" ..." if len(prepared.hospitals) > 8 else ""),
        *(f"          without {entry.name}: {entry.reason}" for entry in prepared.left_out[:_MOST_LINES]),
        f"model     {config.model.name}, {config.federation.rounds} rounds of "
        f"{config.privacy.local_steps} steps, seed {config.federation.seed}",
        f"privacy   {privacy}",
        f"folder    {prepared.folder}",
    ]


def config_epsilon() -> float:
    """The budget where none is asked for."""
    from simulations.scenario import DEFAULT_EPSILON

    return float(DEFAULT_EPSILON)


def conclusion(folder: Path, result: dict[str, Any], report: Path) -> list[str]:
    """The last lines: scores, hospitals, where everything is."""
    from common.pages.html import bound

    lines = [f"{result.get('status')} after {result.get('rounds')} rounds"]
    for split, name in (
        ("validation", "validation"),
        ("held back", "held_back_validation"),
        ("test", "test"),
    ):
        scores = result.get(name) or {}
        shown = [score for score in _SHOWN if scores.get(score)]
        if not shown:
            continue
        first, *others = [f"{score} {scores[score]:.3f}" for score in shown]
        interval, noise = (scores.get("ci95") or {}).get("auc"), scores.get("noise") or {}
        bounds = f" (95 % {interval[0]:.3f} to {interval[1]:.3f})" if interval else ""
        if noise.get(shown[0]):
            bounds = f" (noise {noise[shown[0]]:.3f}, from the hospitals' counts)"
        lines.append(f"{split:<11}{', '.join([first + bounds, *others])}")
    hospitals = result.get("hospitals", [])
    for hospital in hospitals[:_MOST_LINES]:
        spent = hospital.get("epsilon")
        outsider = hospital.get("epsilon_outsider")
        against = f" ({bound(outsider, 3)} against an outsider)" if outsider is not None else ""
        claim = (
            f"epsilon {bound(spent, 3)} at delta {hospital['delta']:.1e}{against}"
            if spent is not None
            else "no claim"
        )
        lines.append(f"  {hospital['name']:<24}{hospital.get('rounds', 0):>4} rounds   {claim}")
    if (more := len(hospitals) - _MOST_LINES) > 0:
        known = [hospital["epsilon"] for hospital in hospitals if hospital.get("epsilon") is not None]
        largest = f", epsilon at most {bound(max(known), 3)}" if known else ""
        lines.append(f"  and {more} hospitals more{largest} in any")
    if result.get("status") == "stopped":
        lines.append(f"continue with: flower-simulate resume {folder}")
    lines.append(f"report: {report}")
    return lines


def _nothing(line: str) -> None:
    """Say nothing."""


def say_on_stderr(line: str) -> None:
    """For commands whose standard output is for programs."""
    print(line, file=sys.stderr, flush=True)


def check_done(outcome: Outcome) -> None:
    """Raise FederationError unless the run came to its end (also by its budget)."""
    if outcome.status not in ("completed", "budget-exhausted"):
        raise FederationError(
            f"the run in {outcome.folder} is {outcome.status}", fix=f"look at {outcome.folder}/metrics.jsonl"
        )
