"""Watching a run: reads its folder while others write it, and never touches the run itself.

On a terminal a table that keeps itself up to date; elsewhere one line per closed round:
`round 3/60  4 of 5 hospitals  test AUC .871  epsilon 1.92  0.42 s  left 24 s`
"""

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING

from common.pages.html import bound, duration, figure, quantity
from server.reporting.round_lines import ClosedRound
from simulations.progress import Progress

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable

POLL_S = 0.2
_MOST_ROWS = 20


@contextmanager
def follow(
    run_folder: Path, *, total_rounds: int, console: "Console | None" = None, quiet: bool = False
) -> Iterator[Progress]:
    """Show the progress of the run in `run_folder` as long as the block lasts; nothing when `quiet`.

    The block gets the `Progress`, which is complete once the block has ended. Reading is incremental and in a
    thread of its own. Without a `console` it shows on standard error: standard output is for results.
    """
    from rich.console import Console

    follower = Follower(
        run_folder, total_rounds=total_rounds, console=console or Console(stderr=True), quiet=quiet
    )
    follower.start()
    try:
        yield follower.progress
    finally:
        follower.close()


class Follower(threading.Thread):
    """Reads the run folder every `POLL_S` seconds and shows what is new."""

    def __init__(self, run_folder: Path, *, total_rounds: int, console: "Console", quiet: bool) -> None:
        super().__init__(name="view", daemon=True)
        self.progress = Progress(run_folder, total_rounds=total_rounds)
        self._console, self._quiet = console, quiet
        self._ended = threading.Event()

    def start(self) -> None:
        """Start to show; rounds of an earlier session of a resumed run are known, not news."""
        self.progress.read()
        super().start()

    def run(self) -> None:
        """Show until `close`, or until nobody can read it any more."""
        with suppress(BrokenPipeError):
            if self._quiet:
                self._watch()
            elif self._console.is_terminal:
                self._show_table()
            else:
                self._print_lines()

    def close(self) -> None:
        """Show the last of what was written, then end; waits for the thread."""
        self._ended.set()
        self.join()

    def _watch(self) -> None:
        while not self._ended.wait(POLL_S):
            self.progress.read()
        self.progress.read()

    def _print_lines(self) -> None:
        while True:
            last = self._ended.wait(POLL_S)
            for closed in self.progress.read():
                self._console.print(
                    line(self.progress, closed), highlight=False, markup=False, soft_wrap=True
                )
            if last:
                return

    def _show_table(self) -> None:
        from rich.live import Live

        view = table(self.progress)
        with Live(view, console=self._console, auto_refresh=False, transient=False) as live:
            while True:
                last = self._ended.wait(POLL_S)
                self.progress.read()
                live.update(table(self.progress), refresh=True)
                if last:
                    return


def line(progress: Progress, closed: ClosedRound) -> str:
    """One closed round for a log file."""
    asked = progress.asked(closed)
    parts = [
        f"round {closed.round_number}/{progress.total_rounds}",
        f"{closed.aggregated} of {asked} hospitals",
        *_score(progress),
        _epsilon(progress),
        duration(progress.seconds_of(closed)),
    ]
    left = progress.seconds_left
    return "  ".join([*parts, f"left {duration(left)}"] if left else parts)


def table(progress: Progress) -> "ConsoleRenderable":
    """The live table: hospitals as rows, the run as title and caption."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    view = Table(
        box=box.SIMPLE_HEAD,
        title=Text(_title(progress)),
        caption=Text(_caption(progress)),
        title_justify="left",
        caption_justify="left",
        pad_edge=False,
    )
    for name in ("hospital", "enrolled", "last round", "epsilon spent", "training"):
        view.add_column(name, justify="left" if name in ("hospital", "last round") else "right")
    for row in progress.rows(_MOST_ROWS):
        spent = bound(row.epsilon) if progress.private else "not private"
        budget = f" of {row.budget:g}" if progress.private and row.budget is not None else ""
        view.add_row(
            Text(row.name),
            quantity(row.enrolled_patients),
            Text(row.state),
            spent + budget,
            duration(row.training_s),
        )
    if (more := progress.num_hospitals - _MOST_ROWS) > 0:
        states = ", ".join(f"{count} {state}" for state, count in progress.states().items())
        view.add_row(Text(f"and {more} more"), "", Text(f"in all: {states}"))
    return view


def _title(progress: Progress) -> str:
    done, total = progress.rounds_done, progress.total_rounds
    filled = round(24 * done / total) if total else 0
    return f"round {done} of {total}  {'━' * filled}{'╌' * (24 - filled)}"


def _caption(progress: Progress) -> str:
    parts = [*_score(progress), _epsilon(progress)]
    if progress.seconds_per_round is not None:
        parts.append(f"{duration(progress.seconds_per_round)} a round")
    if progress.seconds_left:
        parts.append(f"left {duration(progress.seconds_left)}")
    return "  ".join(part for part in parts if part)


def _score(progress: Progress) -> Sequence[str]:
    point = progress.newest_score
    if point is None:
        return []
    # Scoring rests between checkpoints: an older model's score says so.
    older = f" (round {point.round_number})" if point.round_number != progress.rounds_done else ""
    return [f"{point.split} AUC {figure(point.auc)}{older}"]


def _epsilon(progress: Progress) -> str:
    return f"epsilon {bound(progress.epsilon)}" if progress.private else "not private"
