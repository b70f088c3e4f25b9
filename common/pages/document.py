"""An HTML page that is one file: style and pictures inside, nothing loaded, no script."""

import base64
from collections.abc import Iterable
from dataclasses import dataclass

from common.pages.html import Html, tag
from common.pages.style import STYLE

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
"""Content security policy of the page: nothing is loaded and no script runs, whatever a name contains."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """One picture."""

    name: str
    """File name without `.png`."""
    title: str
    alt: str
    """What the picture shows, for who cannot see it."""
    png: bytes
    svg: bytes = b""
    """The same as lines and text, where it was drawn so; a page then shows this one."""

    @property
    def address(self) -> str:
        """The picture itself as the address of an image."""
        kind, content = ("svg+xml", self.svg) if self.svg else ("png", self.png)
        return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def document(title: str, *content: Html) -> str:
    """A page of its own: style inside, nothing loaded from anywhere."""
    head = tag(
        "head",
        tag("meta", charset="utf-8"),
        tag("meta", http_equiv="Content-Security-Policy", content=POLICY),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        tag("title", title),
        tag("style", Html(STYLE)),
    )
    footer = tag("footer", "Research use only, not a medical device. Written by hospital-federation.")
    body = tag("body", content[0], tag("main", *content[1:]), footer)
    return f"<!DOCTYPE html>\n{tag('html', head, body, lang='en')}\n"


def images(plots: Iterable[Plot | None]) -> Html:
    """Plots side by side, each inside the page and with its text alternative."""
    figures = [
        tag(
            "figure",
            tag("img", src=plot.address, alt=plot.alt),
            tag("figcaption", plot.title),
        )
        for plot in plots
        if plot is not None
    ]
    return tag("div", *figures, class_="plots") if figures else Html("")
