"""The tables of the finished runs: Markdown and JSON."""

import json
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from paper_tables.config import Table, text_of
from paper_tables.runs import DIVERGED, FINISHED, Lookup, Work, choose
from slzo.tasks.registry import get_task
from slzo.utils.files import write_json, write_text
from slzo.utils.sampling_error import standard_error
from tables import markdown_table

Entry = dict[str, Any]
"""Figures of a method on a task, as under ``entries`` in table.json: means over the finished seeds with the chosen learning rate.

``score_se`` is the standard error of the score over seeds; over held-out rows if there is one seed. ``dev_loss`` is the mean of
the lowest dev losses, ``layer`` the dominant layer of the first seed.
"""


def make_entry(table: Table, method: str, task: str, result: Lookup) -> Entry:
    """Return the figures of a method on a task."""
    best = choose(table.grid(method, task), result)
    seeds = table.seeds_of(method, task)
    cells = [] if best is None else [table.cell(method, task, seed, best.lr) for seed in seeds]
    found = [r for r in map(result, cells) if r is not None]
    tried = list(map(result, table.grid(method, task)))
    if best is None and None not in tried:  # every learning rate diverged
        found = [r for r in tried[:1] if r is not None]
    good = [r for r in found if r["state"] == FINISHED]

    def mean(name: str) -> float | None:
        return _mean([r[name] for r in good if r.get(name) is not None])

    scores = [r["score"] for r in good]
    means = ("dev_loss", "steps", "evaluations", "train_seconds", "peak_memory_gb", "tuned_parameters")
    return {
        "method": method,
        "task": task,
        "metric": get_task(task).metric,
        "score": _mean(scores),
        "score_se": standard_error(scores) if len(seeds) > 1 else mean("score_se"),
        "num_seeds": len(good),
        "num_planned": len(seeds),
        "num_diverged": len(found) - len(good),
        "lr": best.lr if best is not None and good else None,
        **{name: mean(name) for name in means},
        "layer": good[0].get("layer") if good else None,
    }


def make_average(method: str, entries: Sequence[Entry]) -> dict[str, Any]:
    """Return the average of a method's entries over the tasks, whose errors are independent; empty until all are finished."""
    own = [entry for entry in entries if entry["method"] == method]
    scores, errors = ([entry[name] for entry in own] for name in ("score", "score_se"))
    score = None if None in scores else _mean(scores)
    error = None if score is None or None in errors else math.hypot(*errors) / len(own)
    return {"method": method, "score": score, "score_se": error}


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def write_tables(work: Work, command: str) -> None:
    """Write table.md and table.json from the finished cells.

    Args:
        work: The cells.
        command: The command that makes this table.
    """
    table, folder = work.table, work.folder
    entries = [make_entry(table, method, task, work.result) for method in table.methods for task in table.tasks]
    averages = [make_average(method, entries) for method in table.methods]
    results, failures = work.results(), work.failures()
    content = {
        "command": command,
        "seeds": list(table.seeds),
        "environments": _distinct([result["environment"] for result in results]),
        "entries": entries,
        "averages": averages,
        "cells": results,
        "failed": failures,
    }
    write_json(folder / "table.json", content)
    text = markdown(table, entries, averages, results, failures, command)
    write_text(folder / "table.md", text)


def _distinct(items: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    return list({json.dumps(item, sort_keys=True): item for item in items}.values())


def markdown(
    table: Table,
    entries: Sequence[Entry],
    averages: Sequence[Mapping[str, Any]],
    results: Sequence[Mapping[str, Any]],
    failures: Sequence[Mapping[str, Any]],
    command: str,
) -> str:
    """Return the scores, their costs, and how they were made."""
    place = {(entry["method"], entry["task"]): entry for entry in entries}
    tasks = list(table.tasks)
    scores, costs = [], []
    for average in averages:
        of_tasks = [_score(place[average["method"], task]) for task in tasks]
        scores.append([average["method"], *of_tasks, _percent(average["score"], average["score_se"])])
    head = ["method", "task", "lr", "dev loss", "tuned", "layer", "steps", "evaluations", "seconds", "peak GiB"]
    forms = {"dev_loss": ".4f", "tuned_parameters": ",.0f", "layer": "d", "steps": ",.0f", "evaluations": ",.0f"}
    forms |= {"train_seconds": ",.1f", "peak_memory_gb": ".2f"}
    for entry in entries:
        lr = "-" if entry["lr"] is None else text_of(entry["lr"])
        figures = [_number(entry[name], form) for name, form in forms.items()]
        costs.append([entry["method"], entry["task"], lr, *figures])
    lines = ["# Scores", "", markdown_table(["method", *tasks, "average"], scores), "", *_score_notes(table, entries)]
    lines += ["", "# Costs", "", markdown_table(head, costs, left=2)]
    lines += [
        "",
        f"Means over seeds. lr: the rate of the grid with the lowest dev loss on seed {table.seeds[0]}. dev loss: the lowest of "
        "a run. tuned: number of tuned elements. seconds: training with the scoring of dev rows, without profile and held-out "
        "rows. peak GiB: memory of the accelerator, or of the process on a CPU; each run has a separate process.",
        "",
        *_trouble(results, failures),
        "# How these tables were made",
        "",
        f"    {command}",
        "",
    ]
    common = ", ".join(f"{name} {value}" for name, value in table.common.items())
    lines.append(
        f"Configs: {', '.join(path.name for path in table.configs)}. Options of every run: {common or 'none'}."
    )
    lines += [f"Made with {_environment(item)}." for item in _distinct([result["environment"] for result in results])]
    lines += ["", "The command of one run of each method follows; table.json has all commands.", ""]
    for method in table.methods:
        mine = [result for result in results if result["method"] == method]
        lines += [f"    {mine[-1]['command']}"] if mine else []
    return "\n".join(lines) + "\n"


def _score_notes(table: Table, entries: Sequence[Entry]) -> list[str]:
    metrics: dict[str, list[str]] = {}
    for entry in entries[: len(table.tasks)]:
        metrics.setdefault(entry["metric"], []).append(entry["task"])
    names = "; ".join(f"{metric}: {', '.join(tasks)}" for metric, tasks in metrics.items())
    if len(table.seeds) > 1:
        errors = (
            f"Mean ± standard error over seeds {', '.join(map(str, table.seeds))}; the untuned model gives the same answers with "
            "every seed and is scored once."
        )
    else:
        errors = f"± is the standard error over rows; seed {table.seeds[0]}."
    notes = [
        f"Percent of held-out rows ({names}), for the checkpoint with the lowest dev loss. {errors} -: not finished."
    ]
    if any(0 < entry["num_seeds"] < entry["num_planned"] for entry in entries):
        notes.append("(n of m): n of the m seeds finished and did not diverge.")
    return notes


def _trouble(results: Sequence[Mapping[str, Any]], failures: Sequence[Mapping[str, Any]]) -> list[str]:
    lines = [f"- {_title(item)} diverged: {item['reason']}" for item in results if item["state"] == DIVERGED]
    lines += [f"- {_title(item)} failed: {item['reason']}" for item in failures]
    return ["# Runs that diverged or failed", "", *lines, ""] if lines else []


def _title(item: Mapping[str, Any]) -> str:
    lr = "" if item["lr"] is None else f", lr {text_of(item['lr'])}"
    return f"{item['method']}, {item['task']}, seed {item['seed']}{lr}"


def _environment(item: Mapping[str, Any]) -> str:
    versions = ", ".join(f"{name} {item[name]}" for name in ("slzo", "torch", "transformers", "lightning"))
    return f"{versions}; {item['cores']} cores, OMP_NUM_THREADS {item['OMP_NUM_THREADS'] or 'not set'}"


def _score(entry: Entry) -> str:
    if entry["score"] is None:
        return "diverged" if entry["num_diverged"] else "-"
    few = f" ({entry['num_seeds']} of {entry['num_planned']})" if entry["num_seeds"] < entry["num_planned"] else ""
    return _percent(entry["score"], entry["score_se"]) + few


def _percent(score: float | None, error: float | None) -> str:
    if score is None:
        return "-"
    return f"{100 * score:.2f}" + ("" if error is None else f" ± {100 * error:.2f}")


def _number(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)
