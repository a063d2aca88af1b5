"""Write an outlier profile with the layer chosen from it, and the race that decided it, to a folder."""

import math
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slzo.plots.profile import profile_plot
from slzo.plots.style import save
from slzo.plots.sweep import sweep_curves_plot
from slzo.utils.files import write_json
from slzo.utils.run_layout import PROFILE_FILE
from slzo.zo.profile import LayerStatistics, OutlierProfile, format_figure
from slzo.zo.selection import Choice
from slzo.zo.selection.base import CLEAR, Margin

PLOT = "outlier_profile"
"""Name of the plot, without the endings .png and .svg."""
_RACE = "race"


def profile_content(profile: OutlierProfile, choice: Choice) -> dict[str, Any]:
    """Return the content of ``outlier_profile.json``, primitives only."""
    margin = _known_margin(choice)
    return {
        "layers": tuple(asdict(layer) for layer in profile.layers),
        "num_sequences": profile.num_sequences,
        "num_forward_passes": profile.num_forward_passes,
        "dominant_layer": choice.layer,
        "rule": choice.reason,
        "title": choice.title,
        "margin": None if margin is None else margin.errors,
        "margin_reason": "" if margin is None else margin.description,
        "notes": _notes(profile, choice),
        "thresholds": choice.thresholds,
    }


def write_profile(folder: Path, content: Mapping[str, Any], choice: Choice | None, model: str, task: str) -> None:
    """Write ``outlier_profile.json`` with its plot and, after a race, ``race.json`` with its curves.

    ``content`` is that of :func:`profile_content`; without a ``choice`` the trials of a race are not known.
    """
    model = model.rstrip("/").rpartition("/")[2]
    write_json(folder / PROFILE_FILE, content)
    save(profile_plot(content, model, task), folder, PLOT)
    if choice is not None and choice.trials:
        curves = {layer: [asdict(score) for score in trial.scores] for layer, trial in choice.trials.items()}
        trials = {str(layer): asdict(trial) for layer, trial in choice.trials.items()}
        write_json(folder / f"{_RACE}.json", {"layer": choice.layer, "reason": choice.reason, "trials": trials})
        save(sweep_curves_plot(curves, f"{model} on {task}: race of the layers", choice.layer), folder, _RACE)


def format_profile(profile: OutlierProfile, choice: Choice | None) -> str:
    """Format the profile as a table with the chosen layer, if any, marked, and say how clear the choice is.

    The column "±" is the standard error of the figure before it. The column "same" is the share of sequences whose largest
    magnitude is in that channel, or at that position.
    """
    lines = [
        "                                                                          without first token",
        "layer    max |h|      ±  median |h|  max/median      ±   kurtosis    max |h|  max/median  channel  same  position  same"
        "  token",
    ]
    for layer in profile.layers:
        mark = "  <- dominant" if choice is not None and layer.index == choice.layer else ""
        lines.append(_row(layer) + mark)
    found = "No layer chosen" if choice is None else f"Dominant layer {choice.layer}: {choice.reason}"
    lines.append(f"{found} ({profile.num_sequences} sequences)")
    if choice is None:
        return "\n".join([*lines, *profile.notes])
    if (margin := _known_margin(choice)) is not None:
        lines.append(_how_clear(margin))
    return "\n".join([*lines, *_notes(profile, choice)])


def bos_note(layer: LayerStatistics, bos_token_id: int | None) -> str | None:
    """Return a remark if a layer's outliers are at the beginning-of-sequence token in all sequences, else ``None``."""
    if bos_token_id is None or layer.token_id != bos_token_id or layer.position != 0 or layer.same_position != 1:
        return None
    return (
        f"In all sequences the outlier of layer {layer.index} is at {layer.token!r}, whatever the prompt: without it max "
        f"{format_figure(layer.rest_max_abs)}, max/median {format_figure(layer.rest_ratio)}."
    )


def _notes(profile: OutlierProfile, choice: Choice) -> tuple[str, ...]:
    """Return the remarks on the profile and on the chosen layer."""
    of_bos = bos_note(profile.layers[choice.layer], profile.bos_token_id)
    return (*profile.notes, *(note for note in (choice.note, of_bos) if note))


def _known_margin(choice: Choice) -> Margin | None:
    """Return the margin of a choice; ``None`` if it is unknown or infinite, which says nothing about other prompts."""
    return choice.margin if choice.margin is not None and math.isfinite(choice.margin.errors) else None


def _row(layer: LayerStatistics) -> str:
    return (
        f"{layer.index:5d} {layer.max_abs:10.4g} {_error(layer.max_abs_se)} {layer.median_abs:11.4g} "
        f"{layer.ratio:11.5g} {_error(layer.ratio_se)} {layer.kurtosis:10.4g} {layer.rest_max_abs:10.4g} "
        f"{layer.rest_ratio:11.5g} {layer.channel:8d} {layer.same_channel:5.0%} {layer.position:9d} "
        f"{layer.same_position:5.0%}  {layer.token!r}"
    )


def _error(value: float | None) -> str:
    """Format a standard error; a dash if it is unknown."""
    return f"{'-':>6}" if value is None else f"{value:6.3g}"


def _how_clear(margin: Margin) -> str:
    if margin.errors >= CLEAR:
        return f"Clear for prompts like these: {margin.description}, and no other figure is closer."
    return (
        f"Not clear: {margin.description}; compare with other prompts (--profiler.text_file FILE) or more of them "
        "(--profiler.num_sequences N), or set --model.layer."
    )
