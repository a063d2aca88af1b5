"""Write the HTML page on one run, or on several runs side by side."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader

from slzo.plots.curves import curves_plot
from slzo.plots.profile import profile_plot
from slzo.plots.style import save, svg_of
from slzo.report.figures import Texts, method, number, score_text, scores, speed, versions
from slzo.report.run_files import RunFiles, read_run
from slzo.utils.files import write_text
from slzo.utils.run_layout import REPORT_FILE
from slzo.version import __version__


def write_report(runs: Sequence[RunFiles], path: Path, curves: str | None = None) -> None:
    """Write the page, one file that opens without a network. Without ``curves``, an SVG, those of the runs are drawn.

    Raises:
        SlzoError: The file cannot be written.
    """
    environment = Environment(
        loader=PackageLoader("slzo", "report"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    tables = {"Method": method, "Time and memory": speed, "Versions": versions}
    page = environment.get_template("template.html").render(
        title=_title(runs),
        runs=runs,
        tiles={run.folder: _tiles(run) for run in runs},
        differences=differing_options([run.config for run in runs]),
        scores=_table(runs, scores),
        curves=curves or _curves(runs),
        profiles=_profiles(runs),
        tables={title: _table(runs, figures) for title, figures in tables.items()},
        version=__version__,
    )
    write_text(path, page)


def _title(runs: Sequence[RunFiles]) -> str:
    kinds = list(dict.fromkeys(" on ".join(part for part in (run.model, run.task) if part) for run in runs))
    subject = ", ".join(kind for kind in kinds if kind) or "slzo"
    return f"{subject}: {runs[0].name}" if len(runs) == 1 else f"{subject}: {len(runs)} runs"


def _tiles(run: RunFiles) -> Texts:
    """Return the most important figures."""
    summary, before, after = run.summary, run.held_out("before"), run.held_out("after")
    layer, of_speed = summary.get("dominant_layer"), speed(run)
    score = score_text(after)
    if before is not None and after is not None:
        score = f"{before.value:.4f} → {after.value:.4f}"
    return {
        f"held-out {run.metric}": score,
        "change": scores(run)["change"],
        "tuned parameters": number(summary.get("tuned_parameters")),
        "layer": "" if layer is None else f"{layer} of {summary.get('num_layers')}",
        "seconds in all": of_speed["seconds in all"],
        "peak memory": of_speed["peak memory"],
    }


def _table(runs: Sequence[RunFiles], figures: Callable[[RunFiles], Texts]) -> list[tuple[str, list[str]]]:
    """Return the name of each figure that at least one run has, with one text per run."""
    columns = [figures(run) for run in runs]
    names = dict.fromkeys(name for rows in columns for name in rows if rows[name])
    return [(name, [rows.get(name) or "-" for rows in columns]) for name in names]


def _curves(runs: Sequence[RunFiles]) -> str:
    drawn = [run.curves for run in runs if run.points or run.train]
    return svg_of(curves_plot(drawn), "curves") if drawn else ""


def _profiles(runs: Sequence[RunFiles]) -> list[dict[str, Any]]:
    """Return names, plot and notes of each distinct profile."""
    drawn: list[tuple[list[str], RunFiles]] = []
    for run in runs:
        same = next((names for names, other in drawn if other.profile == run.profile), None)
        if same is not None:
            same.append(run.name)
        elif run.profile:
            drawn.append(([run.name], run))
    return [
        {
            "names": ", ".join(names),
            "svg": svg_of(profile_plot(run.profile, run.model, run.task), f"profile-{number}"),
            "notes": [note for note in (run.profile["margin_reason"], *run.profile["notes"]) if note],
        }
        for number, (names, run) in enumerate(drawn)
    ]


def differing_options(configs: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """Return each option that differs between runs, with one value per run; ``None`` if a run lacks the option.

    Empty configs, as those of runs from Python, are not compared.
    """
    known = [config for config in configs if config]
    names = sorted({name for config in configs for name in config})
    rows = [(name, [config.get(name) for config in configs]) for name in names]
    return [row for row in rows if any(config.get(row[0]) != known[0].get(row[0]) for config in known)]


def write_run_report(folder: Path) -> Path:
    """Draw the curves of a run and write its page, from the files in its folder; return the path of the page."""
    run = read_run(folder)
    svg = save(curves_plot([run.curves], f"{run.model} on {run.task}"), folder, "curves")
    write_report([run], folder / REPORT_FILE, curves=svg)
    return folder / REPORT_FILE
