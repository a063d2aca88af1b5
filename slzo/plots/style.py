"""Common style of all plots: size, colours, integer ticks for layers, and the file formats."""

from __future__ import annotations

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING

from slzo.utils.files import replacing, write_text
from slzo.utils.signals import signals_held

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BLUE, ORANGE, GREEN, RED, GREY = "#1f77b4", "#d9730d", "#2a8a3e", "#c62828", "#777777"
LAYER = "decoder layer (from 0)"
_DASHES = ("-", "--", ":", "-.")


def new_figure(width: float, height: float, title: str, below: str = "") -> Figure:
    """Make an empty figure, size in inches, with a title and a smaller line below it.

    The margins are fixed: a layout engine would double the time to draw.
    """
    from matplotlib.figure import Figure  # half a second, and only plots need it

    figure = Figure(figsize=(width, height))
    head = 0.35 * bool(title) + 0.22 * bool(below)
    figure.subplots_adjust(
        left=0.85 / width,
        right=1 - 0.15 / width,
        bottom=0.5 / height,
        top=1 - (head + 0.12) / height,
        hspace=0.25,
        wspace=0.22,
    )
    figure.text(0.5, 1 - 0.1 / height, plain(title), ha="center", va="top", fontsize=11, weight="bold")
    figure.text(0.5, 1 - 0.35 / height, plain(below), ha="center", va="top", fontsize=9, color=GREY)
    return figure


def plain(text: str) -> str:
    """Return a text whose dollar signs matplotlib does not read as formulas."""
    return text.replace("$", r"\$")


def style_axis(axis: Axes, x: str, y: str, *, whole: bool = True) -> None:
    """Label the axes and draw a light grid; with ``whole`` the x axis has only integer ticks."""
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if whole:
        from matplotlib.ticker import MaxNLocator

        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def lines(count: int) -> list[tuple[str, str]]:
    """Return a colour and dashes for each line: ten distinct colours, then the same colours with other dashes."""
    from matplotlib.colors import TABLEAU_COLORS

    return list(islice(cycle((colour, dashes) for dashes in _DASHES for colour in TABLEAU_COLORS), count))


@contextmanager
def _drawing() -> Iterator[None]:
    """Hold signals, and do not warn of characters that the font does not have, within a block."""
    with signals_held(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from font")
        yield


def svg_of(figure: Figure, name: str) -> str:
    """Return the figure as SVG with text elements; ``name`` makes its ids unique within a page."""
    from matplotlib import rc_context

    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}), _drawing():
        figure.savefig(file, format="svg", metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    return text[text.index("<svg") :]


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write ``name.png`` and ``name.svg``; return the SVG as text.

    Raises:
        SlzoError: The files cannot be written.
    """
    with replacing(folder / f"{name}.png") as partial, _drawing():
        figure.savefig(partial, dpi=120)
    svg = svg_of(figure, name)
    write_text(folder / f"{name}.svg", f'<?xml version="1.0" encoding="utf-8"?>\n{svg}')
    return svg
