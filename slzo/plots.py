"""Figures, drawn without a display and without matplotlib's global state."""

from matplotlib.figure import Figure

from slzo.zo.profile import OutlierProfile


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
