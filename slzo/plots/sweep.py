"""Draw the results of a sweep over the layers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from slzo.plots.style import BLUE, GREEN, LAYER, ORANGE, RED, lines, new_figure, style_axis

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def sweep_plot(rows: Sequence[Mapping[str, Any]], title: str, below: str, loss: str) -> Figure:
    """Draw sensitivity, outlier ratio and gain by layer with standard errors, and mark the chosen layer.

    ``rows`` are those under ``layers`` in ``sweep.json``, and ``below`` is the line below the title.
    """
    figure = new_figure(8, 8, title, below)
    axes = figure.subplots(3, sharex=True)
    layers = [row["layer"] for row in rows]
    style = {"color": BLUE, "markersize": 4, "capsize": 3, "linewidth": 1.2}
    if measured := _known(rows, "sensitivity", "sensitivity_se"):
        axes[0].errorbar(*measured, fmt="o-", **style)
    axes[1].semilogy(layers, [row["outlier_ratio"] for row in rows], "s-", color=ORANGE, markersize=4, linewidth=1.2)
    if bars := _known(rows, "gain"):
        axes[2].bar(*bars, color=GREEN)
    if repeated := _known(rows, "gain", "loss_se"):
        axes[2].errorbar(*repeated, fmt="none", color="black", capsize=3)
    chosen = next((row["layer"] for row in rows if row["dominant"]), None)
    names = ("|L+ - L-| / (2 eps)", "outlier ratio max / median", f"gain: {loss} before - after")
    for axis, name in zip(axes, names, strict=True):
        if chosen is not None:
            axis.axvline(chosen, color=RED, linewidth=6, alpha=0.25, label=f"chosen layer {chosen}")
        style_axis(axis, "", name)
    axes[2].set_xlabel(LAYER, fontsize=9)
    if chosen is not None:
        axes[0].legend(fontsize=8, frameon=False)
    return figure


def _known(rows: Sequence[Mapping[str, Any]], *names: str) -> list[list[Any]]:
    """Return the layers and the named values of the rows that have all of these; empty if there are none."""
    known = [row for row in rows if all(row[name] is not None for name in names)]
    return [[row[name] for row in known] for name in ("layer", *names)] if known else []


def sweep_curves_plot(
    curves: Mapping[int, Sequence[Mapping[str, Any]]], title: str, chosen: int | None, loss: str = "dev loss"
) -> Figure:
    """Draw the dev loss of each trained layer over steps and over seconds; the chosen layer's lines are thicker.

    ``curves`` has the scores by layer, as in ``sweep.json``.
    """
    figure = new_figure(11, 4.8, title)
    steps, seconds = figure.subplots(1, 2, sharey=True)
    for (layer, curve), (colour, dashes) in zip(sorted(curves.items()), lines(len(curves)), strict=True):
        losses = [score["loss"] for score in curve]
        width = 2.6 if layer == chosen else 1.2
        style = {"color": colour, "linestyle": dashes, "linewidth": width, "marker": "o", "markersize": 3}
        label = f"layer {layer}" + (" (chosen)" if layer == chosen else "")
        steps.plot([max(1, score["step"]) for score in curve], losses, label=label, **style)
        seconds.plot([score["seconds"] for score in curve], losses, **style)
    steps.set_xscale("log")
    style_axis(steps, "steps", loss, whole=False)
    style_axis(seconds, "training seconds", "", whole=False)
    steps.legend(fontsize=8, ncols=2, frameon=False)
    return figure
