"""A session of a run: where it starts, how it goes on, and what it leaves when it ends or fails."""

import contextlib
import importlib.metadata
import logging
from collections.abc import Iterator
from dataclasses import replace

from flwr.serverapp import Grid

from common.config import FederationConfig
from common.errors import ConfigError, FederationError
from common.parameters import template_of
from server.checkpoint import restore_newest, write_checkpoint
from server.closing import hand_out_model
from server.collection import Status, take_late_replies
from server.evaluation import evaluate_checkpoint
from server.evaluation_result import EVALUATIONS
from server.federation import Federation
from server.hospitals import GRACE_S, Admission, Roster, await_hospitals
from server.initial_weights import initial_weights
from server.recount import recounted
from server.result import write_card, write_model, write_result
from server.round import run_round
from server.run_folder import RunFolder
from server.run_state import RunState, frozen_settings
from server.spent import with_spent, write_spent
from server.totals import HospitalTotals
from server.update_grid import first_grid

log = logging.getLogger(__name__)


def restore(folder: RunFolder, config: FederationConfig) -> RunState | None:
    """The newest whole checkpoint, None for a new run. Raises CheckpointError, ConfigError."""
    state = restore_newest(folder.checkpoints)
    if state is None:
        return None
    plan = frozen_settings(config)
    changed = sorted(key for key in {*plan, *state.plan} if plan.get(key) != state.plan.get(key))
    if changed:
        key = changed[0]
        raise ConfigError(
            f"{key} = {plan.get(key)!r} cannot be changed in a run that has started",
            why=f"the run began with {key} = {state.plan.get(key)!r}",
            fix="resume with the settings in config.toml of the run folder, or start a new run",
        )
    folder.forget_rounds_after(state.round_number)
    log.info("the run goes on after round %d", state.round_number)
    return with_spent(state, folder.spent)


def begin(folder: RunFolder, config: FederationConfig) -> RunState:
    """A new run: initial weights, kept as checkpoint 0."""
    state = RunState.start(config, run_id=folder.new_run_id, weights=initial_weights(config))
    folder.forget_rounds_after(0)
    (folder.path / EVALUATIONS).unlink(missing_ok=True)
    write_spent(folder.spent, run_id=state.run_id, hospitals={})
    write_checkpoint(folder.checkpoints, state, keep=config.server.keep_checkpoints)
    return state


def open_federation(grid: Grid, folder: RunFolder, config: FederationConfig, state: RunState) -> Federation:
    """Bind what stays the same for all rounds of this session."""
    folder.keep_config(config)
    enrolled = {name: totals.enrolled_patients for name, totals in state.hospitals.items()}
    return Federation(
        grid=grid,
        config=config,
        folder=folder,
        roster=Roster(grid, enrolled=enrolled, admission=_admission(grid, config)),
        attempt=folder.attempt(),
        earlier_s=state.wall_s,
    )


def _admission(grid: Grid, config: FederationConfig) -> Admission | None:
    """Who may take part, where there is a roster. Raises ConfigError when the engine knows no keys."""
    if not config.runtime.roster:
        return None
    enrolled_as = getattr(grid, "enrolled_as", None)
    if enrolled_as is None:
        raise ConfigError(
            f"[runtime] roster = {config.runtime.roster!r} cannot be kept here",
            why="this engine does not know the keys of its nodes",
            fix="start a federation of real hospitals with flower-server start; simulations have no roster",
        )
    names = {"version": "hospital-federation", "flwr": "flwr"} if config.server.require_same_release else {}
    versions = {key: importlib.metadata.version(name) for key, name in names.items()}
    return Admission(enrolled_as=enrolled_as, versions=versions)


def wait_for_quorum(federation: Federation, state: RunState) -> Status | None:
    """Wait for the hospitals; the status says why the run cannot start, None when it can."""
    config, folder = federation.config, federation.folder
    is_done = state.round_number >= config.federation.rounds
    present = await_hospitals(
        federation.roster,
        federation.envelope(state),
        quorum=config.server.quorum,
        expected=config.runtime.expected_hospitals,
        patience_s=min(GRACE_S, config.server.patience_s) if is_done else config.server.patience_s,
        stop=lambda: folder.stop_requested,
    )
    if folder.stop_requested:
        return Status.STOPPED
    return None if present or is_done else Status.QUORUM_LOST


def with_first_grid(federation: Federation, state: RunState) -> RunState:
    """Before round 1: choose its grid and keep it, so that a question asked again has the same."""
    if state.round_number or state.grid:
        return state
    largest = max(federation.roster.enrolled.values(), default=1)
    grid = first_grid(federation.config.public_plan, template_of(state.weights), largest_weight=largest)
    if not grid:
        return state
    state = replace(state, grid=grid)
    write_checkpoint(federation.folder.checkpoints, state, keep=federation.config.server.keep_checkpoints)
    return state


def run_rounds(federation: Federation, state: RunState) -> tuple[RunState, Status]:
    """Train the rounds that are left, with the checkpoints' scoring; gives the last state and the ending."""
    state = with_first_grid(federation, state)
    while state.round_number < federation.config.federation.rounds:
        if federation.folder.stop_requested:
            return state, Status.STOPPED
        evaluate_checkpoint(federation, state)
        before, (state, ending) = state, run_round(federation, state)
        before.let_go(state)
        if ending is not None:
            return state, ending
    return state, Status.COMPLETED


def finish(federation: Federation, state: RunState, status: Status) -> None:
    """Leave model and result; hand the model out when the run will not go on."""
    folder, config = federation.folder, federation.config
    totals = dict(state.hospitals)
    for name, count in federation.roster.enrolled.items():  # who came and gave nothing is shown too
        totals.setdefault(name, HospitalTotals(enrolled_patients=count))
    take_late_replies(federation, totals)
    write_spent(folder.spent, run_id=state.run_id, hospitals=totals)
    state = replace(state, hospitals=recounted(config, totals))
    write_model(folder, config, state)
    write_result(folder, config, state, status, wall_s=federation.wall_s)
    write_card(folder)
    if status in (Status.COMPLETED, Status.BUDGET_EXHAUSTED):
        receipts = hand_out_model(federation, state)
        write_result(folder, config, state, status, wall_s=federation.wall_s, receipts=receipts)
    folder.forget_stop()
    log.info("the run is %s after %d rounds: %s", status.value, state.round_number, folder.path)


@contextlib.contextmanager
def failures_recorded(folder: RunFolder, config: FederationConfig) -> Iterator[None]:
    """On an exception leave a result that says so, with what the newest checkpoint holds, and pass it on."""
    try:
        yield
    except BaseException as error:
        status = Status.FAILED if isinstance(error, Exception) else Status.STOPPED
        with contextlib.suppress(FederationError, OSError):
            if (state := restore_newest(folder.checkpoints)) is not None:
                state = with_spent(state, folder.spent)
                state = replace(state, hospitals=recounted(config, state.hospitals))
                write_result(folder, config, state, status, wall_s=state.wall_s)
        raise
