"""One picture as PNG, or as PNG and SVG, with a text that says the same (matplotlib, drawn off screen).

Names of classes and hospitals come from elsewhere: they are drawn as plain text, never as formulas.
"""

import io
import re
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from common.pages.style import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_DASHES = ("-", "--", "-.", ":")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


@contextmanager
def canvas(*, width: float = 6.4, height: float = 4.0) -> Iterator[tuple["Axes", Callable[[], bytes]]]:
    """Empty axes and the function that renders them to PNG; width and height in inches."""
    with _axes(width, height) as (axes, save):
        yield axes, lambda: save("png")


@contextmanager
def drawing(
    *, width: float = 6.4, height: float = 4.0
) -> Iterator[tuple["Axes", Callable[[], dict[str, bytes]]]]:
    """Like `canvas`, rendered to `png` and to `svg`, which is sharp in print and has its texts as text."""
    with _axes(width, height) as (axes, save):
        yield axes, lambda: {"png": save("png"), "svg": _bare_svg(save("svg"))}


@contextmanager
def _axes(width: float, height: float) -> Iterator[tuple["Axes", Callable[[str], bytes]]]:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    look: Any = {
        "text.parse_math": False,
        "font.size": 10,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.edgecolor": "#52606d",
        "axes.grid": True,
        "axes.axisbelow": True,
        "grid.color": "#e3e8ed",
        "legend.frameon": False,
        "svg.fonttype": "none",
        "svg.hashsalt": "hospital-federation",
    }
    with matplotlib.rc_context(look), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; its text stands in the tables.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        picture = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasAgg(picture)

        def save(kind: str) -> bytes:
            buffer = io.BytesIO()
            said = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
            picture.savefig(buffer, format=kind, dpi=130, metadata=said)
            return buffer.getvalue()

        yield picture.add_subplot(), save


def _bare_svg(content: bytes) -> bytes:
    """The element `svg` alone: no document type and no metadata, which name addresses."""
    text = content.decode()
    return re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL).encode()


def line_style(index: int) -> dict[str, Any]:
    """Colour, dash and marker of the line `index`, so that lines differ without colour too."""
    return {
        "color": COLOURS[index % len(COLOURS)],
        "linestyle": _DASHES[index % len(_DASHES)],
        "marker": _MARKERS[index % len(_MARKERS)],
        "markersize": 3.5,
        "linewidth": 1.6,
    }


def short(name: str, length: int = 28) -> str:
    """A name on one line, cut where it is too long for a label; printable characters only."""
    plain = "".join(letter if letter.isprintable() else " " for letter in name)
    return plain if len(plain) <= length else plain[: length - 1] + "…"


def whole_ticks(axes: "Axes") -> None:
    """Number rounds by whole numbers."""
    from matplotlib.ticker import MaxNLocator

    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
