"""Draw an outlier profile: the figures of every layer, the thresholds and the chosen layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slzo.plots.style import BLUE, GREY, LAYER, ORANGE, RED, new_figure, style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

PAPER = {"max_abs": 100.0, "ratio": 1000.0}
"""Thresholds of the first outlier layer (Sun et al. 2024, arXiv 2402.17762); drawn if a rule has no thresholds."""

_PANELS = (("max_abs", "largest |h|", BLUE), ("ratio", "largest / median |h|", ORANGE))


def profile_plot(profile: Mapping[str, Any], model: str, task: str) -> Figure:
    """Draw the largest magnitude and its ratio to the median by layer, on log axes, with standard errors.

    ``profile`` is the content of ``outlier_profile.json``; model and task are named in the title.
    """
    chosen, layers = int(profile["dominant_layer"]), profile["layers"]
    subject = " on ".join(part for part in (model, task) if part)
    head = f"layer {chosen} of {len(layers)}, {profile['title']}"
    below = str(profile["rule"])
    title = f"{subject}: {head}" if subject else head
    figure = new_figure(8, 5, title, below if len(below) < 110 else below[:107] + "...")
    thresholds = dict(profile["thresholds"])
    for axis, (name, label, colour) in zip(figure.subplots(2, sharex=True), _PANELS, strict=True):
        _panel(axis, layers, name, colour)
        _threshold(axis, thresholds.get(name), PAPER[name])
        axis.axvline(chosen, color=RED, linewidth=6, alpha=0.25, label=f"layer {chosen}")
        style_axis(axis, "", label)
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel(LAYER, fontsize=9)
    return figure


def _panel(axis: Axes, layers: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    values = [layer[name] for layer in layers]
    # on a log axis an error bar must not reach 0
    below = [min(layer[f"{name}_se"] or 0.0, 0.99 * layer[name]) for layer in layers]
    above = [layer[f"{name}_se"] or 0.0 for layer in layers]
    axis.set_yscale("log")
    index = [layer["index"] for layer in layers]
    axis.errorbar(index, values, [below, above], fmt="o-", color=colour, markersize=4, capsize=2, linewidth=1.2)


def _threshold(axis: Axes, threshold: float | None, paper: float) -> None:
    if threshold is not None:
        axis.axhline(threshold, color=RED, linestyle="--", linewidth=1, label=f"threshold {threshold:,g}")
    else:
        label = f"{paper:,g}, threshold of the first outlier layer (not used)"
        axis.axhline(paper, color=GREY, linestyle=":", linewidth=1, label=label)
