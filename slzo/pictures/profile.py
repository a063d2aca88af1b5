"""An outlier profile as a card: the figures of every layer, the thresholds and the chosen layer."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slzo.pictures.style import BLUE, GREY, LAYER, ORANGE, RED, picture, tidy

PAPER = {"max_abs": 100.0, "ratio": 1000.0}
"""Thresholds of the first outlier layer (Sun et al. 2024, arXiv 2402.17762); drawn where a rule has none of its own."""

_PANELS = (("max_abs", "largest |h|", BLUE), ("ratio", "largest / median |h|", ORANGE))


def profile_picture(profile: Mapping[str, Any], model: str = "", task: str = "") -> Figure:
    """Largest magnitude and its ratio to the median by layer, on log axes, with standard errors.

    Args:
        profile: As ``outlier_profile.json`` has it; profiles of former versions lack thresholds and standard errors.
        model: What the model is called.
        task: Whose prompts were profiled.
    """
    chosen, layers = int(profile["dominant_layer"]), profile["layers"]
    of = " on ".join(part for part in (model, task) if part)
    called = profile.get("title", "chosen layer")
    head = f"layer {chosen} of {len(layers)}, {called}" if chosen >= 0 else "no layer chosen"
    below = str(profile["rule"])
    figure = picture(8, 5, f"{of}: {head}" if of else head, below if len(below) < 110 else below[:107] + "...")
    thresholds = dict(profile.get("thresholds") or ())
    for axis, (name, label, colour) in zip(figure.subplots(2, sharex=True), _PANELS, strict=True):
        _panel(axis, layers, name, colour)
        _threshold(axis, thresholds.get(name), PAPER[name])
        if chosen >= 0:
            axis.axvline(chosen, color=RED, linewidth=6, alpha=0.25, label=f"layer {chosen}")
        tidy(axis, "", label)
        axis.legend(fontsize=8, frameon=False)
    axis.set_xlabel(LAYER, fontsize=9)
    return figure


def _panel(axis: Axes, layers: Sequence[Mapping[str, Any]], name: str, colour: str) -> None:
    values = [layer[name] for layer in layers]
    # a log axis has no place for a bar that reaches 0
    below = [min(layer.get(f"{name}_se") or 0.0, 0.99 * layer[name]) for layer in layers]
    above = [layer.get(f"{name}_se") or 0.0 for layer in layers]
    axis.set_yscale("log")
    index = [layer["index"] for layer in layers]
    axis.errorbar(index, values, [below, above], fmt="o-", color=colour, markersize=4, capsize=2, linewidth=1.2)


def _threshold(axis: Axes, own: float | None, paper: float) -> None:
    if own is not None:
        axis.axhline(own, color=RED, linestyle="--", linewidth=1, label=f"threshold {own:,g}")
    else:
        label = f"{paper:,g}, threshold of the first outlier layer (not used)"
        axis.axhline(paper, color=GREY, linestyle=":", linewidth=1, label=label)
