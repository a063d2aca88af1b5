"""Write an outlier profile, and the race that decided it, to a folder."""

from dataclasses import asdict
from pathlib import Path

from slzo.pictures.profile import profile_picture
from slzo.pictures.style import save
from slzo.pictures.sweep import sweep_curves_picture
from slzo.utils.files import write_json
from slzo.utils.run_layout import PROFILE_FILE
from slzo.zo.profile import LayerStatistics, OutlierProfile
from slzo.zo.selection import Choice
from slzo.zo.selection.base import CLEAR

PICTURE = "outlier_profile"
"""Name of the picture, without the endings .png and .svg."""
_RACE = "race"


def write_profile(folder: Path, profile: OutlierProfile, choice: Choice | None, model: str, task: str) -> None:
    """Write ``outlier_profile.json`` with its picture and, after a race, ``race.json`` with its curves.

    Args:
        folder: Folder to write to.
        profile: The profile.
        choice: Choice of the layer, with the trials of a race.
        model: Name or path of the model, for the pictures.
        task: Name of the task, for the pictures.
    """
    model = model.rstrip("/").rpartition("/")[2]
    write_json(folder / PROFILE_FILE, asdict(profile))
    save(profile_picture(asdict(profile), model, task), folder, PICTURE)
    if choice is not None and choice.trials:
        curves = {layer: [asdict(score) for score in trial.scores] for layer, trial in choice.trials.items()}
        trials = {str(layer): asdict(trial) for layer, trial in choice.trials.items()}
        write_json(folder / f"{_RACE}.json", {"layer": choice.layer, "reason": choice.reason, "trials": trials})
        save(sweep_curves_picture(curves, f"{model} on {task}: race of the layers", choice.layer), folder, _RACE)


def format_profile(profile: OutlierProfile) -> str:
    """Format the profile as a table with the chosen layer marked, and say how clear the choice is.

    The column "±" is the standard error of the figure before it. The column "same" is the share of sequences whose largest
    magnitude is in that channel, or at that position.
    """
    lines = [
        "                                                                          without first token",
        "layer    max |h|      ±  median |h|  max/median      ±   kurtosis    max |h|  max/median  channel  same  position  same"
        "  token",
    ]
    for layer in profile.layers:
        mark = "  <- dominant" if layer.index == profile.dominant_layer else ""
        lines.append(_row(layer) + mark)
    found = (
        "No layer chosen"
        if profile.dominant_layer is None
        else f"Dominant layer {profile.dominant_layer}: {profile.rule}"
    )
    lines.append(f"{found} ({profile.num_sequences} sequences)")
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
    """Format a figure; a dash of the same width if it is unknown."""
    width = form.partition(".")[0]
    return f"{'-':>{width}}" if value is None else f"{value:{form}}"


def _how_clear(margin: float, reason: str) -> str:
    if margin >= CLEAR:
        return f"Clear for prompts like these: {reason}, and no other figure is closer."
    return (
        f"Not clear: {reason}; compare with other prompts (--profiler.text_file FILE) or more of them "
        "(--profiler.num_sequences N), or set --model.layer."
    )
