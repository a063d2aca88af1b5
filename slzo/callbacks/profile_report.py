"""An outlier profile as a table."""

from slzo.zo.profile import LayerStatistics, OutlierProfile
from slzo.zo.selection.margin import CLEAR


def format_profile(profile: OutlierProfile) -> str:
    """The profile as a table, the chosen layer marked, and how clear the choice is.

    "+-" is the standard error of the figure before it, "same" the share of the sequences whose largest magnitude is in that
    channel, or at that position.
    """
    lines = [
        "                                                                          without first token",
        "layer    max |h|     +-  median |h|  max/median     +-   kurtosis    max |h|  max/median  channel  same  position  same"
        "  token",
    ]
    for layer in profile.layers:
        mark = "  <- dominant" if layer.index == profile.dominant_layer else ""
        lines.append(_row(layer) + mark)
    if profile.dominant_layer >= 0:
        lines.append(
            f"Dominant layer {profile.dominant_layer}: {profile.rule} ({profile.num_sequences} sequences, "
            f"{profile.num_forward_passes} batched forward passes)"
        )
    else:
        lines.append(f"No dominant layer: {profile.rule}")
    if profile.margin is not None:
        lines.append(_how_clear(profile.margin, profile.margin_reason))
    return "\n".join([*lines, *profile.notes])


def _row(layer: LayerStatistics) -> str:
    return (
        f"{layer.index:5d} {layer.max_abs:10.4g} {_cell(layer.max_abs_se, '6.3g')} {layer.median_abs:11.4g} "
        f"{layer.ratio:11.5g} {_cell(layer.ratio_se, '6.3g')} {layer.kurtosis:10.4g} "
        f"{_cell(layer.rest_max_abs, '10.4g')} {_cell(layer.rest_ratio, '11.5g')} "
        f"{layer.channel:8d} {_cell(layer.same_channel, '5.0%')} {layer.position:9d} {_cell(layer.same_position, '5.0%')}"
        f"  {layer.token!r}"
    )


def _cell(value: float | None, form: str) -> str:
    """A figure in its column; a dash where it is not known."""
    width = form.partition(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def _how_clear(margin: float, reason: str) -> str:
    if margin >= CLEAR:
        return f"Clear for prompts like these: {reason}, and nothing is closer."
    return (
        f"Not clear: {reason}; compare with other prompts (--profiler.text_file FILE) or more of them "
        "(--profiler.num_sequences N), or set --model.layer."
    )
