"""What all pictures share: size, colours, whole layer ticks, and how they are saved."""

import io
from collections.abc import Sequence
from pathlib import Path

from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from slzo.files import replacing

BLUE, ORANGE, GREEN, RED, GREY = "#1f77b4", "#d9730d", "#2a8a3e", "#c62828", "#777777"
LAYER = "decoder layer (from 0)"
_DASHES = ("-", "--", ":", "-.")
_DISTINCT = 10


def picture(width: float, height: float, title: str, below: str = "") -> Figure:
    """An empty figure, in inches, with a title and a line below it."""
    figure = Figure(figsize=(width, height), layout="constrained")
    figure.suptitle(title + (f"\n{below}" if below else ""), fontsize=11)
    return figure


def tidy(axis: Axes, x: str, y: str, *, whole: bool = True) -> None:
    """Name the axes and draw a light grid; ``whole``: the x axis counts, so that it has whole ticks."""
    axis.set_xlabel(x, fontsize=9)
    axis.set_ylabel(y, fontsize=9)
    axis.tick_params(labelsize=8)
    axis.grid(visible=True, alpha=0.25)
    axis.spines[["top", "right"]].set_visible(False)
    if whole:
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))


def lines(count: int) -> list[tuple[str, str]]:
    """Colour and dashes for each of some lines: ten colours that are told apart, then the same ones with other dashes."""
    tones = [str(tone) for tone in _hex(colormaps["tab10"].colors)]  # type: ignore[attr-defined]
    return [(tones[n % _DISTINCT], _DASHES[n // _DISTINCT % len(_DASHES)]) for n in range(count)]


def _hex(colours: Sequence[Sequence[float]]) -> list[str]:
    return ["#" + "".join(f"{round(255 * part):02x}" for part in colour) for colour in colours]


def svg_of(figure: Figure, name: str) -> str:
    """The figure as SVG, its texts as texts; ``name`` keeps the ids of several on one page apart."""
    text = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    found = text.getvalue()
    return found[found.index("<svg") :]


def save(figure: Figure, folder: Path, name: str) -> None:
    """Write ``name.png`` and ``name.svg``.

    Raises:
        SlzoError: They cannot be written.
    """
    with replacing(folder / f"{name}.png") as partial:
        figure.savefig(partial, dpi=120)
    with replacing(folder / f"{name}.svg") as partial:
        partial.write_text('<?xml version="1.0" encoding="utf-8"?>\n' + svg_of(figure, name), encoding="utf-8")
