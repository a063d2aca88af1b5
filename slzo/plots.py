"""Figures, drawn without a display and without matplotlib's global state."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from slzo.zo.profile import OutlierProfile

if TYPE_CHECKING:
    from slzo.experiments.sweep import SweepRow


def profile_figure(profile: OutlierProfile) -> Figure:
    """Largest magnitude and max/median by layer, on log axes, the chosen layer marked."""
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.add_subplot()
    index = [layer.index for layer in profile.layers]
    axis.semilogy(index, [layer.max_abs for layer in profile.layers], "o-", color="tab:blue", label="max |h|")
    axis.semilogy(index, [layer.ratio for layer in profile.layers], "s-", color="tab:orange", label="max / median")
    axis.axvline(profile.dominant_layer, color="tab:red", linestyle="--", label=f"layer {profile.dominant_layer}")
    axis.set_xlabel("decoder layer (from 0)")
    axis.set_title(profile.rule, fontsize=9)
    axis.grid(visible=True, which="major", alpha=0.3)
    axis.legend()
    return figure


def sweep_figure(rows: Sequence["SweepRow"]) -> Figure:
    """Sensitivity, outlier ratio and gain by layer, one above the other, the chosen layer marked."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    layers = [row.layer for row in rows]
    axes[0].errorbar(
        layers, [row.sensitivity for row in rows], [row.sensitivity_se for row in rows], fmt="o-", capsize=3
    )
    axes[0].set_ylabel("sensitivity |L+ - L-| / (2 eps)")
    axes[1].semilogy(layers, [row.outlier_ratio for row in rows], "s-", color="tab:orange")
    axes[1].set_ylabel("outlier ratio max / median")
    trained = [row for row in rows if row.gain is not None]
    errors = [row.loss_se or 0.0 for row in trained]
    axes[2].bar([row.layer for row in trained], [row.gain or 0.0 for row in trained], yerr=errors, color="tab:green")
    axes[2].set_ylabel("gain: dev loss before - after")
    axes[2].set_xlabel("decoder layer (from 0)")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
        for row in rows:
            if row.dominant:
                axis.axvline(row.layer, color="tab:red", linestyle="--", label=f"chosen layer {row.layer}")
    if any(row.dominant for row in rows):
        axes[0].legend()
    return figure
