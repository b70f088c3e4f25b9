"""The content of a benchmark as cells and lines, for the terminal and for docs/benchmarks.md."""

from collections.abc import Iterator, Mapping
from typing import Any

from simulations.benchmarks.figures import figures_of

Content = Mapping[str, Any]

BUSY_SPREAD = 1.5
"""Quartiles of equal calls further apart than this are no measurement."""
_MOST_LAYERS = 24
"""More than these are shown by kind."""
STEP_COLUMNS = (
    "step",
    "SGD",
    "twin",
    "DP",
    "ratio",
    "middle half",
    "hooks / DP",
    "ghost / DP",
    "memory",
    "calls",
)
FIGURE_COLUMNS = ("figure", "bar", "measured", "holds")


def figure_rows(content: Content, *, only_measured: bool = False) -> list[list[str]]:
    """The figures with a bar as cells under FIGURE_COLUMNS."""
    return [
        [figure.name, figure.bar, figure.measured, figure.verdict]
        for figure in figures_of(content)
        if figure.holds is not None or not only_measured
    ]


def step_rows(content: Content) -> list[list[str]]:
    """The steps as cells under STEP_COLUMNS."""
    return [
        [
            step["case"],
            milliseconds(step["seconds_sgd"]),
            step["twin"],
            milliseconds(step["seconds_dp"]),
            f"{step['ratio_to_sgd']:.2f}",
            f"{step['ratio_quartiles'][0]:.2f} to {step['ratio_quartiles'][2]:.2f}",
            _times(step["speedup_over_hooks"]),
            _times(step["speedup_over_ghost"]),
            "unknown" if step["memory_ratio"] is None else f"{step['memory_ratio']:.2f}",
            str(step["repeats"]),
        ]
        for step in content.get("dp_step", ())
    ]


def profile_table(profile: Content) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of `profile_step` in milliseconds: each phase as twin -> ours, and the difference."""
    from simulations.benchmarks.layer_profile import by_kind

    layers = profile["layers"] if len(profile["layers"]) <= _MOST_LAYERS else by_kind(profile)
    phases = [
        phase
        for phase in profile["phases"]
        if any(row[side].get(phase) for row in layers for side in ("sgd", "dp"))
    ]
    rows = [[row["layer"], *(_pair(row, phase) for phase in phases), _difference([row])] for row in layers]
    total = {
        side: {phase: sum(row[side].get(phase, 0.0) for row in layers) for phase in phases}
        for side in ("sgd", "dp")
    }
    rows.append(["all", *(_pair(total, phase) for phase in phases), _difference([total])])
    return ["layer", *phases, "DP - SGD"], rows


def _pair(row: Content, phase: str) -> str:
    sgd, dp = (1000 * row[side].get(phase, 0.0) for side in ("sgd", "dp"))
    return "" if max(sgd, dp) < 0.005 else f"{sgd:.2f} -> {dp:.2f}"


def _difference(rows: list[Any]) -> str:
    return f"{1000 * sum(sum(row['dp'].values()) - sum(row['sgd'].values()) for row in rows):+.2f}"


def other_lines(content: Content) -> list[str]:
    """Everything but the steps, for a person."""
    return [
        *_cautions(content),
        *_noise_lines(content),
        *_wire_lines(content),
        *_accuracy_lines(content),
        *_server_lines(content),
        *_engine_lines(content),
        *_startup_lines(content),
        *(f"{'scale':9} {line}" for line in flat(content.get("scale", {}))),
        machine_line(content),
    ]


def machine_line(content: Content) -> str:
    """Machine, versions and date."""
    machine = content["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("python", "torch", "opacus", "flwr", "numpy"))
    return (
        f"machine   {machine['cpu']}, {machine['cores']} cores, {machine['threads']} threads, "
        f"{versions}, {machine['date']}"
    )


def flat(content: Content, prefix: str = "") -> Iterator[str]:
    """`name: value` for every number and text, without what is raw."""
    for name, value in content.items():
        if name == "raw":
            continue
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{name}.")
        elif isinstance(value, float):
            yield f"{prefix}{name}: {value:.4g}"
        else:
            yield f"{prefix}{name}: {value}"


def _cautions(content: Content) -> Iterator[str]:
    busy = [step["case"] for step in content.get("dp_step", ()) if step["spread"] > BUSY_SPREAD]
    if busy:
        yield f"caution   something else used the machine during {', '.join(busy)}: measure again"
    for part, about in content.get("parts", {}).items():
        if "failed" in about:
            yield f"caution   {part} failed: {about['failed']}"


def _noise_lines(content: Content) -> Iterator[str]:
    if noise := content.get("noise"):
        shares = ", ".join(
            f"{100 * step['noise_share']:.1f} % of {step['case']}" for step in content["dp_step"]
        )
        each = noise["nanoseconds"]
        yield (
            f"noise     {each['grid']:.1f} ns a parameter on the grid (torch {each['torch']:.1f}, four draws "
            f"{each['torch-four']:.1f}, cipher alone {each['cipher']:.1f}): {shares}; "
            f"{noise['seconds_large_model']:.2f} s for 25 million"
        )


def _wire_lines(content: Content) -> Iterator[str]:
    for name, size in content.get("wire", {}).items():
        if "bytes_message" in size:
            yield (
                f"update    {name}: {size['bytes_message']:,} bytes, "
                f"{size['ratio_to_float32']:.3f} of float32 ({size['parameters']:,} parameters)"
            )


def _accuracy_lines(content: Content) -> Iterator[str]:
    if accuracy := content.get("accuracy"):
        yield (
            f"accuracy  {accuracy['model']}, {accuracy['seeds']} seeds: test AUC "
            f"{accuracy['auc_float32']:.4f} in float32, {accuracy['auc_8_bits']:.4f} in 8 bits, "
            f"{accuracy['largest_difference']:.4f} apart at most"
        )


def _server_lines(content: Content) -> Iterator[str]:
    if server := content.get("server"):
        yield (
            f"server    {server['updates']} updates of {server['parameters']:,} parameters: spooled in "
            f"{milliseconds(server['seconds_spool'])}, reduced in {milliseconds(server['seconds_reduce'])} "
            f"({server['throughput_ratio']:.2f} of numpy's a += w * b)"
        )
        if memory := server.get("memory"):
            yield (
                f"server    {memory['hospitals']} hospitals x {memory['parameters']:,} parameters: "
                f"{memory['bytes_above_idle'] / 1e6:,.0f} MB above idle, "
                f"{memory['models_above_idle']:.2f} models"
            )


def _engine_lines(content: Content) -> Iterator[str]:
    if engine := content.get("engine"):
        yield (
            f"engine    {engine['hospitals']} hospitals, {engine['rounds']} rounds: first training step "
            f"after {engine['seconds_to_first_training_step']:.1f} s, "
            f"{engine['overhead_s_per_round']:.2f} s overhead a round, "
            f"result after {engine['seconds_command_to_result']:.1f} s"
        )
        yield from (f"engine    {line}" for line in flat(engine.get("against_ray", {}), "against_ray."))


def _startup_lines(content: Content) -> Iterator[str]:
    if startup := content.get("startup"):
        slowest = max(startup["commands"], key=lambda name: float(startup["commands"][name]["seconds"]))
        decode = startup["decode"]
        yield (
            f"startup   slowest of {len(startup['commands'])} commands: {slowest} in "
            f"{milliseconds(startup['commands'][slowest]['seconds'])}"
        )
        yield (
            f"startup   {decode['images']} films: read in {decode['seconds_first']:.2f} s, again in "
            f"{decode['seconds_second']:.2f} s, by a plain loop in {decode['seconds_loop']:.2f} s"
        )
        yield from (
            f"startup   noise for epsilon {case['epsilon']:g} in {case['steps']:g} steps solved in "
            f"{case['cpu_seconds']:.2f} s of one core"
            for case in startup["solver"]["cases"]
        )


def milliseconds(seconds: float) -> str:
    """For example `12.3 ms`."""
    return f"{1000 * seconds:.1f} ms"


def _times(value: float | None) -> str:
    return "not measured" if value is None else f"{value:.2f} x"
