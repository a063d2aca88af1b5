"""The page: one run, or several side by side."""

from collections.abc import Callable, Iterable, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from slzo import __version__
from slzo.files import write_text
from slzo.pictures.curves import curves_picture
from slzo.pictures.profile import profile_picture
from slzo.pictures.style import svg_of
from slzo.report.differences import differing
from slzo.report.figures import Rows, method, scores, speed, versions
from slzo.report.run_files import RunFiles

REPORT_FILE = "report.html"
"""Of a run in its folder."""

_MISSING = "-"


def write_report(runs: Sequence[RunFiles], path: Path, curves: str | None = None) -> None:
    """Write the page: one file, which opens without a network.

    Args:
        runs: One, or several side by side.
        path: Of the page.
        curves: Their curves as SVG, where they are drawn already.

    Raises:
        SlzoError: It cannot be written.
    """
    write_text(path, report_page(runs, curves))


def report_page(runs: Sequence[RunFiles], curves: str | None = None) -> str:
    """The page as HTML; see :func:`write_report`."""
    template = Template((resources.files("slzo.report") / "template.html").read_text(encoding="utf-8"))
    title = _title(runs)
    sections = [
        f"<h1>{escape(title)}</h1>",
        *(_opening(run, len(runs) > 1) for run in runs),
        _section("What differs", _differences(runs)) if len(runs) > 1 else "",
        _section("Scores", _table(runs, scores)),
        _section("Curves", f"<figure>{curves}</figure>" if curves else _curves(runs)),
        _section("Which layer", _profiles(runs)),
        _section("Predictions before and after", "".join(_samples(run, len(runs) > 1) for run in runs)),
        _section("Method", _table(runs, method)),
        _section("Time and memory", _table(runs, speed)),
        _section("Versions", _table(runs, versions)),
        _section("Options", "".join(_options(run) for run in runs)),
    ]
    folders = ", ".join(escape(str(run.folder)) for run in runs)
    return template.substitute(title=escape(title), body="\n".join(sections), version=__version__, folders=folders)


def _title(runs: Sequence[RunFiles]) -> str:
    kinds = list(dict.fromkeys(" on ".join(part for part in (run.model, run.task) if part) for run in runs))
    what = ", ".join(kind for kind in kinds if kind) or "slzo"
    return f"{what}: {runs[0].name}" if len(runs) == 1 else f"{what}: {len(runs)} runs"


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>\n{content}</section>" if content else ""


def _opening(run: RunFiles, named: bool) -> str:
    """What became of a run, in a sentence and in tiles."""
    summary, said = run.summary, ""
    if summary.get("verdict"):
        said = f"<p>{escape(summary['verdict'])}</p>"
    elif not summary:
        said = "<p>This run has no summary: it was stopped before its end, or only profiled.</p>"
    if summary.get("next"):
        said += f"<p class='soft'>Next:</p><pre>{escape(summary['next'])}</pre>"
    all_figures = {**scores(run), **method(run), **speed(run)}
    before, after = all_figures["before"], all_figures["after"]
    tiles = {
        f"held-out {run.metric}": f"{before.partition(' ')[0]} → {after.partition(' ')[0]}" if before else after,
        "change": all_figures["change"],
        "tuned parameters": all_figures["tuned parameters"].partition(" of ")[0],
        "layer": all_figures["layer"].partition(":")[0],
        "seconds in all": all_figures["seconds in all"],
        "peak memory": all_figures["peak memory"],
    }
    shown = "".join(
        f"<div class='tile'><b>{escape(text)}</b><span>{escape(name)}</span></div>"
        for name, text in tiles.items()
        if text
    )
    head = f"<h3>{escape(run.name)}</h3>" if named else ""
    return f"{head}{said}<div class='tiles'>{shown}</div>"


def _differences(runs: Sequence[RunFiles]) -> str:
    rows = differing([run.config for run in runs])
    if not rows:
        return "<p>No option of these runs differs.</p>"
    return _grid(runs, [(name, [_value(value) for value in values]) for name, values in rows])


def _value(value: Any) -> str:
    return _MISSING if value is None else str(value)


def _table(runs: Sequence[RunFiles], figures: Callable[[RunFiles], Rows]) -> str:
    found = [figures(run) for run in runs]
    names = list(dict.fromkeys(name for rows in found for name in rows if rows[name]))
    return _grid(runs, [(name, [rows.get(name) or _MISSING for rows in found]) for name in names]) if names else ""


def _grid(runs: Sequence[RunFiles], rows: Iterable[tuple[str, Sequence[str]]]) -> str:
    """A row for each figure, a column for each run."""
    head = "".join(f"<th>{escape(run.name)}</th>" for run in runs)
    head = f"<thead><tr><th></th>{head}</tr></thead>" if len(runs) > 1 else ""
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(text)}</td>' for text in texts)}</tr>"
        for name, texts in rows
    )
    return f"<div class='wide'><table>{head}<tbody>{body}</tbody></table></div>"


def _curves(runs: Sequence[RunFiles]) -> str:
    drawn = [run.curves for run in runs if run.points or run.train]
    return f"<figure>{svg_of(curves_picture(drawn), 'curves')}</figure>" if drawn else ""


def _profiles(runs: Sequence[RunFiles]) -> str:
    """The profile of each run; one that several share is drawn once."""
    drawn: list[tuple[list[str], RunFiles]] = []
    for run in runs:
        same = next((names for names, other in drawn if other.profile == run.profile), None)
        if same is not None:
            same.append(run.name)
        elif run.profile:
            drawn.append(([run.name], run))
    cards = []
    for number, (names, run) in enumerate(drawn):
        head = f"<h3>{escape(', '.join(names))}</h3>" if len(runs) > 1 else ""
        svg = svg_of(profile_picture(run.profile, run.model, run.task), f"profile-{number}")
        notes = [str(run.profile.get("margin_reason") or ""), *map(str, run.profile.get("notes") or ())]
        said = "".join(f"<p class='soft'>{escape(note)}</p>" for note in notes if note)
        cards.append(f"<div>{head}<figure>{svg}</figure>{said}</div>")
    return f"<div class='beside'>{''.join(cards)}</div>" if cards else ""


def _samples(run: RunFiles, named: bool) -> str:
    if not run.samples:
        return ""
    rows = "".join(_sample(sample) for sample in run.samples)
    head = f"<h3>{escape(run.name)}</h3>" if named else ""
    columns = "<thead><tr><th>prompt</th><th>right</th><th>before</th><th>after</th></tr></thead>"
    return f"{head}<div class='wide'><table class='samples'>{columns}<tbody>{rows}</tbody></table></div>"


def _sample(sample: Any) -> str:
    cells = [f"<td>{escape(str(sample['prompt']))}</td><td>{escape(', '.join(sample['gold']) or _MISSING)}</td>"]
    for when in ("before", "after"):
        text = sample.get(when)
        if text is None:
            cells.append(f"<td>{_MISSING}</td>")
            continue
        right = text.strip() in [gold.strip() for gold in sample["gold"]]
        cells.append(f"<td class='{'right' if right else 'wrong'}'>{escape(text)} {'✓' if right else '✗'}</td>")
    return f"<tr>{''.join(cells)}</tr>"


def _options(run: RunFiles) -> str:
    if not run.config:
        return ""
    lines = "\n".join(f"{name}: {_value(value)}" for name, value in run.config.items())
    return (
        f"<details><summary>{escape(run.name)}: {len(run.config)} options</summary><pre>{escape(lines)}</pre></details>"
    )
