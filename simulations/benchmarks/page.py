"""Writes what was measured into docs/benchmarks.md, between two markers, and raw numbers beside it as JSON.

Parts that a run did not measure are kept from the JSON file, if they come from the same machine and versions.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from common.errors import ConfigError
from common.files import write_bytes_atomically
from simulations.benchmarks.tables import (
    FIGURE_COLUMNS,
    STEP_COLUMNS,
    figure_rows,
    flat,
    other_lines,
    profile_table,
    step_rows,
)

BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"
_CONTENTS = {"dp_step": ("dp_step", "noise", "profile")}
"""Names in the content that belong to a part, where there are others than the part's own."""
_SAME = ("cpu", "cores", "threads", "python", "torch", "flwr", "opacus", "numpy")
_RAW = ("wire", "accuracy", "server", "engine", "scale", "startup")
Content = Mapping[str, Any]


def page_text(path: Path) -> str:
    """Read the page; raises ConfigError unless it has both markers, so that nothing is measured in vain."""
    text = path.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1 or text.index(BEGIN) > text.index(END):
        raise ConfigError(
            f"--write {path} has no place for the figures", fix=f"put {BEGIN} and {END} on lines of their own"
        )
    return text


def write_page(path: Path, content: Content) -> None:
    """Put `content` into the page and into the JSON file beside it."""
    text, beside = page_text(path), path.with_suffix(".json")
    stored = json.loads(beside.read_text()) if beside.exists() else {}
    together = _rounded(merged(content, stored))
    before, after = text[: text.index(BEGIN) + len(BEGIN)], text[text.index(END) :]
    write_bytes_atomically(beside, (json.dumps(together) + "\n").encode())
    write_bytes_atomically(path, f"{before}\n{render(together)}{after}".encode())


def merged(content: Content, stored: Content) -> dict[str, Any]:
    """`content`, and the parts of `stored` that it lacks, if both are of one machine and set of versions."""
    mine, other = content["machine"], stored.get("machine", {})
    if any(mine[name] != other.get(name) for name in _SAME):
        return dict(content)
    # A part that failed now stays as it was.
    measured = {part for part, about in content["parts"].items() if "failed" not in about}
    kept = {part: about for part, about in stored["parts"].items() if part not in measured}
    names = [name for part in kept for name in _CONTENTS.get(part, (part,)) if name in stored]
    return {
        **{name: stored[name] for name in names},
        **content,
        "parts": {**content["parts"], **kept},
    }


def _rounded(content: Content) -> dict[str, Any]:
    """Six digits are more than a clock tells."""
    rounded: dict[str, Any] = json.loads(
        json.dumps(content), parse_float=lambda number: float(f"{float(number):.6g}")
    )
    return rounded


def render(content: Content) -> str:
    """Everything between the markers, as Markdown."""
    return "\n".join(_lines(content)) + "\n"


def _lines(content: Content) -> Iterator[str]:
    machine = content["machine"]
    yield f"Measured on {machine['date'][:10]} with `{content['command']}`."
    yield ""
    memory = "unknown" if machine["memory_bytes"] is None else f"{machine['memory_bytes'] / 1e9:.0f} GB"
    yield f"* Machine: {machine['cpu']}, {machine['cores']} cores, memory {memory}, {machine['system']}."
    named = {"hospital-federation": "hospital_federation", "Python": "python", "PyTorch": "torch"}
    named |= {"Opacus": "opacus", "Flower": "flwr", "numpy": "numpy"}
    yield f"* Versions: {', '.join(f'{name} {machine[key]}' for name, key in named.items())}."
    yield f"* {machine['threads']} threads of torch for every way. Load before: {_load(machine)}."
    yield from (f"* {_about(part, about)}" for part, about in content["parts"].items())
    yield from ("", "### Figures with a bar", "")
    yield from markdown_table(FIGURE_COLUMNS, figure_rows(content))
    if content.get("dp_step"):
        yield from ("", "### Steps", "")
        yield from markdown_table(STEP_COLUMNS, step_rows(content))
        yield from ("", "Without a number, and why:", "") if _absent(content) else ()
        yield from (f"* {line}" for line in _absent(content))
    for profile in content.get("profile", ()):
        yield from ("", f"### Layers of {profile['case']}", "")
        steps = f"medians of {profile['repeats']} steps"
        yield f"Milliseconds, the twin's (`{profile['twin']}`) -> ours; {steps}."
        yield ""
        yield from markdown_table(*profile_table(profile))
    yield from ("", "### In words", "")
    yield from (f"* {' '.join(line.split())}" for line in other_lines(content))
    for part in _RAW:
        if content.get(part):
            yield from ("", f"### {part}", "")
            yield from markdown_table(
                ("name", "value"), [line.split(": ", 1) for line in flat(content[part])]
            )
    yield ""


def _about(part: str, about: Content) -> str:
    command = f" with `{about['command']}`" if "command" in about else ""
    if "failed" in about:
        return f"`{part}` failed on {about['date']}: {about['failed']}"
    return f"`{part}` began at {about['date']} and took {about['seconds']:.0f} s{command}."


def _load(machine: Content) -> str:
    return "unknown" if machine["load_1min"] is None else f"{machine['load_1min']:.2f}"


def _absent(content: Content) -> list[str]:
    return [
        f"{step['case']}, {way}: {reason}"
        for step in content["dp_step"]
        for way, reason in step["not_measured"].items()
    ]


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """A table in Markdown; the first column to the left, the others to the right."""
    yield f"| {' | '.join(columns)} |"
    yield f"|---|{'---:|' * (len(columns) - 1)}"
    yield from (f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)
