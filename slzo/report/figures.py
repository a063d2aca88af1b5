"""Format the figures of a run for readers."""

from collections.abc import Mapping
from typing import Any

from slzo.plots.curves import ScorePoint
from slzo.report.run_files import RunFiles
from slzo.report.score_change import other_scores
from slzo.utils.sampling_error import plus_minus

Texts = Mapping[str, str]
"""Texts by name; a text is empty if the run lacks the figure."""


def scores(run: RunFiles) -> Texts:
    """Format the held-out scores with their standard errors, and the dev loss."""
    summary = run.summary
    change, error = summary.get("score_change"), summary.get("score_change_standard_error")
    kind = "" if error is None else " (paired)" if summary.get("score_change_paired") else " (unpaired)"
    losses = [point.loss for point in run.points if point.loss is not None]
    return {
        "metric": run.metric if summary else "",
        "held-out rows": number(summary.get("num_rows")),
        "before": score_text(run.held_out("before")),
        "after": score_text(run.held_out("after")),
        "change": "" if change is None else f"{change:+.4f}{plus_minus(error)}{kind}",
        "other metrics": other_scores(summary) if summary else "",
        "largest class": _share(summary.get("majority_share")),
        "bag of words": _share(summary.get("reference_score")) or summary.get("reference_problem", ""),
        "dev loss, first to best": f"{losses[0]:.4f} → {min(losses):.4f}" if losses else "",
    }


def _share(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def score_text(score: ScorePoint | None) -> str:
    """Format a held-out score with its standard error."""
    return "" if score is None else f"{score.value:.4f}{plus_minus(score.standard_error)}"


def method(run: RunFiles) -> Texts:
    """Format what was tuned and how."""
    summary = run.summary
    layer, total = summary.get("dominant_layer"), summary.get("num_layers")
    tuned, parameters = summary.get("tuned_parameters"), summary.get("total_parameters")
    return {
        "model": str(summary.get("model") or run.config.get("model.model") or ""),
        "task": run.task,
        "scope": str(summary.get("scope", "")),
        "layer": "" if layer is None else f"{layer} of {total}: {summary.get('layer_reason', '')}",
        "tuned parameters": f"{tuned:,} of {parameters:,}" if tuned is not None and parameters else "",
        "estimator": str(summary.get("estimator", "")),
        "optimizer": str(summary.get("optimizer", "")),
        "learning rate": _rate(summary),
        "eps": number(summary.get("eps")),
        "seed": number(summary.get("seed")),
    }


def _rate(summary: Mapping[str, Any]) -> str:
    given, end = summary.get("lr"), summary.get("lr_at_end")
    return "" if given is None else f"{given}" + ("" if end is None or end == given else f", {end:.3g} at the end")


def speed(run: RunFiles) -> Texts:
    """Format steps, time and memory."""
    summary = run.summary
    steps, training = summary.get("steps"), summary.get("train_seconds")
    memory = summary.get("peak_memory_gb")
    return {
        "steps": number(steps),
        "evaluations of a batch": number(summary.get("evaluations")),
        "seconds in all": number(summary.get("seconds")),
        "seconds of training": number(training),
        "seconds a step, validations included": f"{training / steps:.3g}" if steps and training else "",
        "peak memory": "" if memory is None else f"{memory:.3g} GiB",
        "skipped steps": number(summary.get("skipped_steps")),
        "rollbacks": number(summary.get("rollbacks")),
    }


def versions(run: RunFiles) -> Texts:
    """Format software versions, hardware and the command."""
    environment = run.environment
    device = str(environment.get("device", ""))
    devices = ", ".join(environment.get("devices") or [])
    return {
        **{name: str(version) for name, version in (environment.get("versions") or {}).items()},
        "commit": str(environment.get("commit") or ""),
        "system": str(environment.get("system", "")),
        "processor": str(environment.get("processor", "")),
        "device": devices if device.startswith("cuda") else device,
        "threads": number(environment.get("threads")),
        "processes": number(environment.get("processes")),
        "command": str(environment.get("command", "")),
    }


def number(value: Any) -> str:
    """Format a number of any kind; empty for ``None``."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.6g}" if isinstance(value, float) else str(value)
