"""Where a step's time goes, layer by layer, ours beside the twin's: what still stands between DP and SGD.

content = profile_step(StepCase.parse("cnn:28:128"), twin="sgd-channels-last")
content["layers"][0]["dp"]["norms"]    seconds of ours; "sgd" has the twin's

Every moment that torch's profiler saw is counted once, with the innermost label around it. Labels named
`dp:<layer>:<phase>` in the production code count as they say; others are put around its methods here.
"""

import os
import statistics
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import nn
from torch.profiler import ProfilerActivity, profile, record_function

from client.training import per_row_layers, recurrence_rows
from client.training.row_gradients import DenseRows, ProductRows, keep
from simulations.benchmarks.cases import StepCase
from simulations.benchmarks.training_steps import DP, DP_RAGGED, SGD, Way, ways_of

PHASES = (
    "forward",
    "data gradient",
    "weight gradient",
    "norms",
    "clipped sum",
    "noise",
    "update",
    "rest",
)
"""data gradient: and whatever else a layer does on the way back. weight gradient: of the batch in the twin;
of each row, or what stands for it, in ours. rest: Python, the loss."""
BETWEEN, TOGETHER = "(between layers)", "(small parameters together)"
os.environ.setdefault("KINETO_LOG_LEVEL", "9")  # its lines of every start and stop tell nobody anything
_STEP = "bench:step"
_BACKWARD = "autograd::engine::evaluate_function"

Cell = tuple[str, str]
"""Layer and phase."""


def profile_step(case: StepCase, *, twin: str = SGD, repeats: int = 7) -> dict[str, Any]:
    """Median seconds of `repeats` steps by layer and phase; twin: name of an eager way."""
    ours, tables = DP_RAGGED if case.ragged else DP, defaultdict[str, list[dict[Cell, float]]](list)
    with ways_of(case.even, [twin, ours]) as ways:
        layers = {name: _layers(way) for name, way in ways.items()}
        for way in ways.values():
            way.step()
        for _ in range(repeats):
            tables["sgd"].append(_with_both_gradients(ways[twin], layers[twin]))
            with _labelled(ways[ours], layers[ours]):
                tables["dp"].append(_profiled(ways[ours], layers[ours]))
    found = {side: _medians(each) for side, each in tables.items()}
    kinds = {name: type(layer).__name__ for name, layer in layers[ours].items()}
    names = [*kinds, *sorted({layer for table in found.values() for layer, _ in table} - kinds.keys())]
    rows = [
        {
            "layer": name,
            "kind": kinds.get(name, ""),
            **{
                side: {phase: table[name, phase] for phase in _phases(found) if table.get((name, phase))}
                for side, table in found.items()
            },
        }
        for name in names
    ]
    return {
        "case": case.name,
        "twin": twin,
        "repeats": repeats,
        "phases": _phases(found),
        "seconds": {side: sum(table.values()) for side, table in found.items()},
        "layers": [row for row in rows if row["sgd"] or row["dp"]],
    }


def by_kind(content: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The layers of `profile_step` added up by their kind."""
    rows: dict[str, dict[str, Any]] = {}
    for row in content["layers"]:
        kind = row["kind"] or row["layer"]
        sums = rows.setdefault(kind, {"layer": kind, "kind": kind, "sgd": {}, "dp": {}})
        for side in ("sgd", "dp"):
            for phase, seconds in row[side].items():
                sums[side][phase] = sums[side].get(phase, 0.0) + seconds
    return list(rows.values())


def _phases(found: Mapping[str, Mapping[Cell, float]]) -> list[str]:
    other = {phase for table in found.values() for _, phase in table} - set(PHASES)
    return [*PHASES, *sorted(other)]


def _medians(tables: Sequence[Mapping[Cell, float]]) -> dict[Cell, float]:
    cells = {cell for table in tables for cell in table}
    return {cell: statistics.median(table.get(cell, 0.0) for table in tables) for cell in sorted(cells)}


def _layers(way: Way) -> dict[str, nn.Module]:
    return {name: layer for name, layer in way.model.named_modules() if name and not list(layer.children())}


def _with_both_gradients(way: Way, layers: Mapping[str, nn.Module]) -> dict[Cell, float]:
    """The twin's step: torch computes both gradients in one call, so the weights' is what freezing saves."""
    table = _profiled(way, layers)
    parameters = [parameter for parameter in way.model.parameters() if parameter.requires_grad]
    first = next(name for name, layer in layers.items() if any(True for _ in layer.parameters()))
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        # One bias of the first layer keeps the graph alive, and its cost is small.
        next(reversed([p for p in layers[first].parameters()])).requires_grad_()
        without = _profiled(way, layers)
    finally:
        for parameter in parameters:
            parameter.requires_grad_()
    for name, layer in layers.items():
        both = table.get((name, "data gradient"), 0.0)
        if not both or not any(True for _ in layer.parameters()):
            continue
        data = 0.0 if name == first else min(both, without.get((name, "data gradient"), 0.0))
        table[name, "data gradient"], table[name, "weight gradient"] = data, both - data
    return table


@contextmanager
def _labelled(way: Way, layers: Mapping[str, nn.Module]) -> Iterator[None]:
    """Labels around those methods of the production path that bear none of their own."""
    names = {id(p): name for name, layer in layers.items() for p in layer.parameters(recurse=False)}
    layer_of: dict[int, str] = {}

    def keep_labelled(parameter: Any, rows: Callable[[], Any]) -> None:
        name = names.get(id(parameter), BETWEEN)
        with record_function(f"dp:{name}:weight gradient"):
            keep(parameter, rows)
        if parameter is not None:
            layer_of[id(getattr(parameter, "grad_sample", None))] = name

    def of_rows(method: Callable[..., Any], phase: str) -> Callable[..., Any]:
        @wraps(method)
        def labelled(rows: Any, *arguments: Any) -> Any:
            with record_function(f"dp:{layer_of.get(id(rows), TOGETHER)}:{phase}"):
                return method(rows, *arguments)

        return labelled

    with ExitStack() as stack:
        for module in (per_row_layers, recurrence_rows):
            stack.enter_context(_replaced(module, "keep", keep_labelled))
        for kind in (DenseRows, ProductRows):
            for method, phase in (("squared_norms", "norms"), ("add_clipped", "clipped sum")):
                stack.enter_context(_replaced(kind, method, of_rows(getattr(kind, method), phase)))
        optimizer = way.optimizer
        for owner, method, phase in (
            (optimizer, "accumulate", "clipped sum"),
            (optimizer, "add_noise", "noise"),
            (optimizer.original_optimizer, "step", "update"),
        ):
            labelled = _around(getattr(owner, method), f"dp:{BETWEEN}:{phase}")
            stack.enter_context(_replaced(owner, method, labelled))
        yield


@contextmanager
def _replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Put `value` in the place of an attribute of a module, class or object, for a while."""
    of_its_own, before = name in vars(owner), getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if of_its_own:
            setattr(owner, name, before)
        else:
            delattr(owner, name)


def _around(function: Callable[..., Any], label: str) -> Callable[..., Any]:
    @wraps(function)
    def labelled(*arguments: Any, **named: Any) -> Any:
        with record_function(label):
            return function(*arguments, **named)

    return labelled


def _profiled(way: Way, layers: Mapping[str, nn.Module]) -> dict[Cell, float]:
    """Seconds of one step by layer and phase, each moment once."""
    profiler = profile(activities=[ProfilerActivity.CPU])
    with _forward_labels(layers), profiler, record_function(_STEP):
        way.step()
    events: list[Any] = list(profiler.events() or ())  # type: ignore[no-untyped-call]
    layer_of_node: dict[int, str] = {}
    for event in events:
        label = _label_around(event)
        if event.sequence_nr >= 0 and label is not None and label[1] == "forward":
            layer_of_node[event.sequence_nr] = label[0]
    table: dict[Cell, float] = defaultdict(float)
    for event in events:
        seconds = 1e-6 * event.self_cpu_time_total
        if seconds > 0 and (event.name == _STEP or _inside_step(event)):
            table[_label_around(event) or _label_of_backward(event, layer_of_node)] += seconds
    return dict(table)


@contextmanager
def _forward_labels(layers: Mapping[str, nn.Module]) -> Iterator[None]:
    open_labels: list[Any] = []

    def begin(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            label = record_function(f"layer:{name}")
            label.__enter__()  # type: ignore[no-untyped-call]
            open_labels.append(label)

        return hook

    def end(*_: Any) -> None:
        open_labels.pop().__exit__(None, None, None)

    handles = [layer.register_forward_pre_hook(begin(name)) for name, layer in layers.items()]
    handles += [layer.register_forward_hook(end) for layer in layers.values()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _label_around(event: Any) -> Cell | None:
    """Innermost label of the event or around it."""
    while event is not None:
        if event.name.startswith("dp:"):
            layer, _, phase = event.name[3:].rpartition(":")
            return layer, phase
        if event.name.startswith("layer:"):
            return event.name[len("layer:") :], "forward"
        event = event.cpu_parent
    return None


def _label_of_backward(event: Any, layer_of_node: Mapping[int, str]) -> Cell:
    while event is not None:
        if event.name.startswith(_BACKWARD):
            return layer_of_node.get(event.sequence_nr, BETWEEN), "data gradient"
        event = event.cpu_parent
    return BETWEEN, "rest"


def _inside_step(event: Any) -> bool:
    while event is not None:
        if event.name == _STEP:
            return True
        event = event.cpu_parent
    return False
