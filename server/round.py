"""One round at the server: one function, its steps numbered, each one call."""

import logging
import math
import time
from dataclasses import replace
from typing import Any

from common import messages
from common.errors import FederationError
from common.parameters import Parameters, l2_norm, template_of
from server.aggregation import aggregate, mean_on_grid
from server.checkpoint import write_checkpoint
from server.collection import Collection, Status, collect_updates
from server.federation import Federation
from server.run_state import RunState
from server.server_optimizer import moving_average, next_weights
from server.spool import SpooledLevels, SpooledVector
from server.totals import HospitalTotals
from server.update_grid import grid_of, next_grid
from server.weighting import weight_of

log = logging.getLogger(__name__)


def run_round(federation: Federation, state: RunState) -> tuple[RunState, Status | None]:
    """Train one round; gives the state after it, or why the run ends here and what the attempt cost."""
    # 1. Send weights, plan and deadline; check every reply, spool what is valid, wait for the quorum.
    collection, ending = collect_updates(federation, state)
    if ending is not None:
        _record_abandoned(federation, state, collection, ending)
        return replace(state, hospitals=collection.totals), ending
    # 2. Reduce the spooled updates block by block, in roster order: arrival does not matter.
    update, grid = _mean_update(federation, state, collection)
    update_norm = l2_norm(update)
    # 3. Server optimiser and moving average; the new weights take the place of the update.
    after = _next_state(federation, state, collection, update, grid)
    # 4. Write down who took part; first, so that a checkpoint never lacks its round.
    federation.folder.record(_lines(federation, after, collection, update_norm, grid=state.grid))
    # 5. Checkpoint: from here on the round is done.
    write_checkpoint(federation.folder.checkpoints, after, keep=federation.config.server.keep_checkpoints)
    collection.spool.clear()
    # 6. Tell the person.
    _tell(federation, after, collection)
    return after, None


def _mean_update(
    federation: Federation, state: RunState, collection: Collection
) -> tuple[Parameters, tuple[int, ...]]:
    """The mean of the updates with their weights, and the spacings of the next round's updates."""
    names, plan, server = collection.accepted, federation.config.public_plan, federation.config.server
    counts = [collection.participations[name].hospital.enrolled_patients for name in names]
    weights = [weight_of(server, enrolled_patients=count) for count in counts]
    grid, template = grid_of(plan, state.grid), template_of(state.weights)
    with collection.spool.opened(names) as updates:
        levels = [update for update in updates if isinstance(update, SpooledLevels)]
        if grid is None:
            vector = aggregate([u for u in updates if isinstance(u, SpooledVector)], weights)
            return collection.spool.unflatten(vector), ()
        vector = mean_on_grid(levels, total_weight=sum(weights), scales=grid.scales(template))
        heaviest = max(totals.enrolled_patients for totals in collection.totals.values())
        following = next_grid(
            plan,
            grid,
            levels,
            template,
            round_number=state.round_number + 1,
            noise_multipliers=[t.noise_multiplier for t in collection.totals.values() if t.noise_multiplier],
            heavier=heaviest / max(weights),
        )
        return collection.spool.unflatten(vector), following


def _next_state(
    federation: Federation,
    state: RunState,
    collection: Collection,
    update: Parameters,
    grid: tuple[int, ...],
) -> RunState:
    settings, round_number = federation.config.server, state.round_number + 1
    weights, optimizer = next_weights(state.weights, update, state.optimizer, settings, out=update)
    if not math.isfinite(l2_norm(weights)):
        raise FederationError(
            f"the model of round {round_number} is not finite",
            why="the server's step is too large for these updates",
            fix="lower server.learning-rate or server.momentum in a new run; the last checkpoint is whole",
        )
    average = state.average
    if settings.ema_decay:
        start = average or state.weights
        average = moving_average(start, weights, decay=settings.ema_decay, round_number=round_number)
    return replace(
        state,
        round_number=round_number,
        weights=weights,
        optimizer=optimizer,
        average=average,
        grid=grid,
        hospitals=_totals(collection),
        wall_s=federation.wall_s,
    )


def _totals(collection: Collection) -> dict[str, HospitalTotals]:
    """One aggregated round more for those whose update counts; what they spent is already in."""
    totals = dict(collection.totals)
    for name in collection.accepted:
        totals[name] = replace(totals[name], rounds=totals[name].rounds + 1)
    return totals


def _lines(
    federation: Federation,
    after: RunState,
    collection: Collection,
    update_norm: float,
    *,
    grid: tuple[int, ...],
) -> list[dict[str, Any]]:
    closing = {
        "round": after.round_number,
        "attempt": federation.attempt,
        "closed": time.time(),
        "aggregated": len(collection.accepted),
        "model_sha256": after.model_sha256,
        "update_norm": update_norm,
        # Base-2 logarithm of the coarsest spacing of this round's updates: `server.outsider` needs it.
        "coarsest_grid_exponent": max(grid, default=None),
    }
    return [*_hospital_lines(federation, after.round_number, collection), closing]


def _hospital_lines(
    federation: Federation, round_number: int, collection: Collection
) -> list[dict[str, Any]]:
    claims = federation.config.claims_privacy
    return [
        {
            "round": round_number,
            "attempt": federation.attempt,
            "hospital": name,
            "outcome": participation.outcome.value,
            "code": participation.code,
            "sent": participation.sent,
            "training_started": participation.metrics.get(messages.TRAINING_STARTED),
            "training_ended": participation.metrics.get(messages.TRAINING_ENDED),
            "received": participation.received,
            "bytes_down": participation.bytes_down,
            "bytes_up": participation.bytes_up,
            "epsilon": participation.epsilon if claims else None,
            # Of an update that counts, what it adds to the average: `server.outsider` composes these.
            "enrolled_patients": participation.hospital.enrolled_patients,
            "stated_patients": participation.hospital.stated_patients,
            "noise_multiplier": participation.metrics.get(messages.NOISE_MULTIPLIER) if claims else None,
            "steps": participation.metrics.get(messages.STEPS) if claims else None,
        }
        for name, participation in sorted(collection.participations.items())
    ]


def _record_abandoned(
    federation: Federation, state: RunState, collection: Collection, ending: Status
) -> None:
    """Keep who answered what; a resumed run drops these lines when it asks the round again."""
    collection.spool.clear()
    lines = _hospital_lines(federation, state.round_number + 1, collection)
    if lines and ending is not Status.STOPPED:
        federation.folder.record(lines)


def _tell(federation: Federation, after: RunState, collection: Collection) -> None:
    log.info(
        "round %d of %d: %d of %d hospitals, %.2f s",
        after.round_number,
        federation.config.federation.rounds,
        len(collection.accepted),
        len(collection.participations),
        time.time() - collection.first_sent,
    )
