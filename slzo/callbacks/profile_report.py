"""An outlier profile as a table and as a figure, drawn without a display and without matplotlib's global state."""

from matplotlib.figure import Figure

from slzo.zo.profile import OutlierProfile


def format_profile(profile: OutlierProfile) -> str:
    """The profile as a table, the chosen layer marked."""
    lines = ["layer    max |h|  median |h|     max/median   kurtosis  channel  token"]
    for layer in profile.layers:
        mark = "  <- dominant" if layer.index == profile.dominant_layer else ""
        lines.append(
            f"{layer.index:5d} {layer.max_abs:10.4g} {layer.median_abs:11.4g} {layer.ratio:14.5g} {layer.kurtosis:10.4g} "
            f"{layer.channel:8d}  {layer.token!r} at {layer.position}{mark}"
        )
    if profile.dominant_layer >= 0:
        lines.append(
            f"Dominant layer {profile.dominant_layer}: {profile.rule} ({profile.num_sequences} sequences, "
            f"{profile.num_forward_passes} batched forward passes)"
        )
    else:
        lines.append(f"No dominant layer: {profile.rule}")
    return "\n".join(lines)


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
