"""`flower-client predict`: what a finished model says about images.

flower-client predict runs/RUN film.dcm                       a table: file, probabilities, decision
flower-client predict runs/RUN films/ --format json           folders of files, DICOM series
flower-client predict runs/RUN films/ --page pages            one offline page per image, with a heat map
flower-client predict runs/A films/ --ensemble runs/B         the average of several models
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from client.prediction.heat_method import HeatMethod
from common.command_line import Output, OutputFormat, print_table

if TYPE_CHECKING:
    from rich.progress import Progress

    from client.prediction.answers import Answer
    from client.prediction.ensemble import Ensemble
    from client.prediction.inputs import Input
    from client.prediction.stored_model import StoredModel

_RULES = "too-small, extreme-aspect, black, constant, low-contrast, coloured, inverted, unlike-reference"


def predict(
    model: Annotated[Path, typer.Argument(help="run folder, or a folder that `models` lists")],
    images: Annotated[list[Path], typer.Argument(help="image files, folders of them, DICOM series")],
    ensemble: Annotated[
        list[Path] | None, typer.Option(help="a further model: all answer, the average counts")
    ] = None,
    heat_map: Annotated[Path | None, typer.Option(help="write a PNG per image: where it was seen")] = None,
    heat_map_method: Annotated[
        HeatMethod, typer.Option(help="gradcam and integrated-gradients alone, or their product")
    ] = HeatMethod.COMBINED,
    page: Annotated[Path | None, typer.Option(help="write an offline HTML page per image")] = None,
    without_check: Annotated[list[str] | None, typer.Option(help=f"do not apply a rule: {_RULES}")] = None,
    reference: Annotated[
        Path | None, typer.Option(help="folder of this site's own genuine images: refuse what is unlike them")
    ] = None,
    max_pixels: Annotated[int, typer.Option(min=1, help="larger pictures are refused")] = 50_000_000,
    output: Output = OutputFormat.TEXT,
) -> None:
    """Say what a trained model sees in images. Trains nothing, charges nothing, needs no network.

    Research use, not a medical device. Exit codes: 0 every image was answered, 1 not every one (the table
    says why), 2 the model or a setting cannot be used.
    """
    from client.prediction.case_page import refuse_beside_images, write_heat_map, write_page
    from client.prediction.ensemble import ask, read_models
    from client.prediction.inputs import find_inputs
    from client.prediction.reference import read_reference

    without = _rules(without_check or [])
    stored = read_models([model, *(ensemble or [])])
    inputs: Sequence[Input]
    if stored.form.is_series:
        from client.prediction.series_inputs import find_series

        inputs = find_series(images, stored.form, max_pixels=max_pixels)
    else:
        inputs = find_inputs(images, max_pixels=max_pixels)
    for folder in filter(None, (heat_map, page)):
        refuse_beside_images(folder, inputs, images)
    wanted = heat_map is not None or (page is not None and _has_maps(stored, heat_map_method))
    known = None
    if reference is not None:
        known = read_reference(find_inputs([reference], max_pixels=max_pixels), max_pixels=max_pixels)
    told: list[dict[str, Any]] = []
    with _progress(len(inputs)) as (bar, task):
        found = ask(
            stored,
            inputs,
            max_pixels=max_pixels,
            without=without,
            with_pictures=page is not None,
            reference=known,
            with_heat=heat_map_method if wanted else None,
        )
        for number, answer in enumerate(found, start=1):
            line = _line(answer)
            if heat_map is not None:
                written = write_heat_map(heat_map, number, answer)
                line["heat_map"] = None if written is None else str(written)
            if page is not None:
                line["page"] = str(write_page(page, number, answer, stored))
            told.append(line)
            bar.advance(task)
    if output is OutputFormat.JSON:
        typer.echo(json.dumps(_content(stored, told), indent=2, ensure_ascii=False, allow_nan=False))
    else:
        _print(stored, told)
    raise typer.Exit(0 if all(line["answered"] for line in told) else 1)


def _rules(names: Sequence[str]) -> frozenset[Any]:
    from client.prediction.doubts import Rule
    from common.errors import ConfigError

    unknown = [name for name in names if name not in list(Rule)]
    if unknown:
        raise ConfigError(f"there is no check {unknown[0]!r}", fix=f"choose of {_RULES}")
    return frozenset(Rule(name) for name in names)


def _has_maps(stored: "StoredModel | Ensemble", method: HeatMethod) -> bool:
    """Whether a page can show heat; asked for by --heat-map, its absence is an error."""
    from client.prediction.ensemble import Ensemble
    from client.prediction.heat_map import layer_of_maps
    from common.errors import ModelError

    if isinstance(stored, Ensemble) or stored.form.is_series:
        return False
    if method is HeatMethod.INTEGRATED_GRADIENTS:
        return True
    side = stored.preprocessing.image_size
    try:
        layer_of_maps(stored.network, (stored.preprocessing.channels, side, side))
    except ModelError:
        return False
    return True


def _line(answer: "Answer") -> dict[str, Any]:
    probabilities = None if answer.probabilities is None else dict(answer.probabilities)
    return {
        "file": answer.name,
        "answered": answer.is_answered,
        "probabilities": probabilities,
        "calibrated": None if answer.calibrated is None else dict(answer.calibrated),
        "decision": answer.decision or None,
        "observed_share": answer.observed,
        "reason": answer.reason or None,
        "what": answer.words or None,
    }


def _content(stored: "StoredModel | Ensemble", told: Sequence[dict[str, Any]]) -> dict[str, Any]:
    from client.prediction.ensemble import Ensemble, stated_privacy
    from client.prediction.passport import limits, passport

    if isinstance(stored, Ensemble):
        members = []
        for member in stored.members:
            epsilon, delta = stated_privacy(member) or (None, None)
            members.append(_identity(member) | {"epsilon": epsilon, "delta": delta})
        about: dict[str, Any] = {"ensemble": {"members": members, "privacy": dict(stored.privacy)}}
        point = None
    else:
        about = {"model": _identity(stored)}
        point = stored.threshold
    return {
        "schema": 1,
        **about,
        "decision": {"rule": stored.rule, "operating_point": point},
        "passport": dict(passport(stored)),
        "limits": limits(stored),
        "answered": sum(line["answered"] for line in told),
        "images": list(told),
    }


def _identity(stored: "StoredModel") -> dict[str, Any]:
    return {"run_id": stored.run_id, "sha256": stored.sha256, "classes": list(stored.task.classes)}


def _print(stored: "StoredModel | Ensemble", told: Sequence[dict[str, Any]]) -> None:
    from client.prediction.ensemble import Ensemble
    from client.prediction.passport import RESEARCH_ONLY, passport

    classes = stored.task.classes
    rows = []
    for line in told:
        said = line["probabilities"] or {}
        shares = [f"{said[name]:.3f}" if name in said else "–" for name in classes]
        why = f"{line['reason']}: {line['what']}" if line["reason"] else ""
        if stored.recalibration is not None:
            better = line["calibrated"] or {}
            shares.append(f"{better[classes[1]]:.3f}" if better else "–")
        rows.append((line["file"], *shares, line["decision"] or "not answered", why))
    corrected = () if stored.recalibration is None else (f"{classes[1]}, calibrated",)
    print_table(("file", *classes, *corrected, "decision", "why not"), rows)
    answered = sum(line["answered"] for line in told)
    typer.echo(f"{answered} of {len(told)} images answered. Decision: {stored.rule}.")
    if isinstance(stored, Ensemble):
        for name, text in passport(stored):
            typer.echo(f"{name}: {text}")
    typer.echo(RESEARCH_ONLY)


@contextmanager
def _progress(total: int) -> Iterator[tuple["Progress", Any]]:
    """A bar on stderr, where somebody looks and waits."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress

    console = Console(stderr=True)
    shown = Progress(
        *Progress.get_default_columns(),
        MofNCompleteColumn(),
        console=console,
        transient=True,
        disable=total < 2 or not console.is_terminal,
    )
    with shown:
        yield shown, shown.add_task("images", total=total)
