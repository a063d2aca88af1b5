"""Summarize a run: what was tuned, how the score changed, how long it took and where the files are."""

import math
import shlex
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

from slzo.evaluation.bag_of_words import WordsReference
from slzo.evaluation.held_out import HeldOutScores
from slzo.report.next_command import first_order_command, next_command
from slzo.report.run_facts import RunFacts
from slzo.report.score_change import dev_loss, is_doubtful, other_scores, score_change, score_error, verdict
from slzo.utils.pluralize import pluralize
from slzo.utils.run_layout import CHECKPOINTS_FOLDER, PREDICTIONS_FILE
from slzo.utils.sampling_error import plus_minus


def summarize(run: RunFacts, before: HeldOutScores | None, after: HeldOutScores) -> dict[str, Any]:
    """Return the content of ``summary.json``, primitives only."""
    metric, num_rows = run.metric.metric, run.num_rows
    if metric == "reward":
        before, after = _on_rewarded_rows(before, after)
        run = replace(run, num_rows=len(after.rows))
    scores_before = {} if before is None else before.metrics
    change = score_change(run.metric, before, after, run.num_rows)
    outcome, history = run.outcome, run.outcome.history
    losses = dev_loss(history.validations, run.metric.loss_name)
    doubtful = is_doubtful(change, losses)
    solved = losses is not None and losses.solved
    # first order follows the same rewards
    constant = losses is not None and losses.unchanged and run.metric.metric == "reward"
    first = None if run.first_order_gb is None or solved or constant else first_order_command(run)
    suggestion = next_command(change, losses, run) if doubtful and not solved else first
    return {
        **run.figures,
        "num_rows": run.num_rows,
        "unscored_rows": num_rows - run.num_rows,
        "dominant_layer": run.layer,
        "metric": metric,
        "selected_by": run.metric.name,
        "score_before": scores_before.get(metric),
        "score_after": after.metrics[metric],
        "score_standard_error": score_error(metric, after.metrics[metric], after.rows, run.num_rows),
        "reference_score": run.reference.accuracy,
        "reference_macro_f1": run.reference.macro_f1,
        "reference_problem": run.reference.problem,
        "ahead": _ahead(run.reference, after.metrics),
        "score_change": None if change is None else change.change,
        "score_change_standard_error": None if change is None else change.standard_error,
        "score_change_paired": None if change is None else change.paired,
        "verdict": verdict(change, losses),
        "doubtful": doubtful,
        "next": suggestion,
        "first_order": first,
        "use": use_commands(run),
        "scores_before": scores_before,
        "scores_after": after.metrics,
        "seconds": round(history.seconds, 2),
        "train_seconds": round(history.train_seconds, 4),
        "validations": list(history.validations),
        "best_checkpoint": outcome.best,
        "run_dir": run.folder,
    }


def _on_rewarded_rows(before: HeldOutScores | None, after: HeldOutScores) -> tuple[HeldOutScores | None, HeldOutScores]:
    """Return the rewards of the rows that have one both times; those at which a function failed have none."""
    if before is None or before.rows.keys() == after.rows.keys():
        return before, after
    common = before.rows.keys() & after.rows.keys()

    def restricted(scores: HeldOutScores) -> HeldOutScores:
        rows = {name: value for name, value in scores.rows.items() if name in common}
        return HeldOutScores({**scores.metrics, "reward": fmean(rows.values()) if rows else math.nan}, rows)

    return restricted(before), restricted(after)


def use_commands(run: RunFacts) -> list[str]:
    """Return commands that use the best checkpoint, or the last one; those on rows need the options in the run's folder."""
    best = run.outcome.best or run.outcome.last
    if best is None:
        return []
    # a checkpoint outside of its run's folder does not lead to the config
    is_found = (
        run.folder is not None and Path(best).absolute().parent == Path(run.folder).absolute() / CHECKPOINTS_FOLDER
    )
    config = ("--config", run.config) if run.config is not None and (run.own_code or not is_found) else ()
    rows = (("test", config, ()), ("predict", config, ("--output", PREDICTIONS_FILE)))
    trust = ("--trust_remote_code", "true") if run.trusts_code else ()
    ways = (
        *(rows if run.config is not None else ()),
        ("export", trust, ("--output", "tuned-model")),
        *(() if run.virtual_tokens else (("generate", trust, ("--prompt", "TEXT")),)),
    )
    return [shlex.join(["slzo", name, *before, "--ckpt_path", best, *after]) for name, before, after in ways]


def format_summary(summary: Mapping[str, Any]) -> str:
    """Format the summary in a few lines; the verdict on a doubtful run comes first, and what to try next at the end."""
    frozen = summary["total_parameters"] - summary["tuned_parameters"]
    layer = summary["dominant_layer"]
    lines = [""]
    if summary["doubtful"]:
        lines += [summary["verdict"] or "", ""]
    lines.append(f"Scope      {summary['scope']}, {summary['estimator']}, {summary['optimizer']}")
    if layer is not None:
        lines.append(f"Layer      {layer} of {summary['num_layers']}: {summary['layer_reason']}")
    lines += [
        f"Parameters {summary['tuned_parameters']:,} tuned, {frozen:,} frozen",
        f"Score      {_score(summary)}",
        *([f"Also       {others}"] if (others := other_scores(summary)) else []),
        *([f"Compare    {references}"] if (references := _references(summary)) else []),
        f"Time       {summary['seconds']:.0f} s in all, {pluralize(summary['steps'], 'step')} in "
        f"{summary['train_seconds']:.0f} s",
    ]
    if summary["planned_memory_gb"] is not None:
        lines.append(
            f"Memory     {summary['peak_memory_gb']:.2f} GiB at most, {summary['planned_memory_gb']:.2f} planned"
        )
    is_loss, name = summary["selected_by"] == "loss", summary["selected_by"]
    if summary["rollbacks"] == 1:
        why = "a dev-loss spike" if is_loss else f"a fall of the dev {name}"
        lines.append(f"Rollback   once, after {why}; the learning rate was halved")
    elif summary["rollbacks"]:
        why = "dev-loss spikes" if is_loss else f"falls of the dev {name}"
        lines.append(f"Rollback   {summary['rollbacks']} times, after {why}; the learning rate was halved each time")
    if summary["skipped_steps"]:
        lines.append(f"Skipped    {pluralize(summary['skipped_steps'], 'step')} without a finite loss")
    if summary["run_dir"]:
        lines.append(f"Files      {summary['run_dir']}")
    if summary["best_checkpoint"]:
        lines.append(f"Checkpoint {summary['best_checkpoint']}")
    lines += [f"{'' if number else 'Use it':10s} {command}" for number, command in enumerate(summary["use"])]
    commands = dict.fromkeys(command for command in (summary["next"], summary["first_order"]) if command is not None)
    lines += [f"{'' if number else 'Next':10s} {command}" for number, command in enumerate(commands)]
    if summary["ahead"] is not None:
        lines.append(summary["ahead"])
    return "\n".join(lines)


def _score(summary: Mapping[str, Any]) -> str:
    """Return the line on the score: before and after, with standard errors."""
    before, change = summary["score_before"], summary["score_change"]
    text = "" if before is None else f"{before:.4f} -> "
    text += f"{summary['score_after']:.4f}{plus_minus(summary['score_standard_error'])} "
    text += f"on {pluralize(summary['num_rows'], 'held-out row')}"
    if summary["unscored_rows"]:
        text += f" ({summary['unscored_rows']} without a reward are left out)"
    if change is not None:
        text += f"; change {change:+.4f}{plus_minus(summary['score_change_standard_error'])}"
    return f"{summary['metric']} {text}"


def _references(summary: Mapping[str, Any]) -> str:
    """Return the scores of simple methods on the same rows; empty if there are none."""
    share, words, problem = (summary[name] for name in ("majority_share", "reference_score", "reference_problem"))
    parts = [] if share is None else [f"largest class {share:.4f}"]
    if words is not None:
        f1 = summary["reference_macro_f1"]
        parts.append(f"bag of words {words:.4f}, macro_f1 {f1:.4f} (TF-IDF and logistic regression)")
    elif problem:
        parts.append(f"no bag of words ({problem})")
    return ", ".join(parts)


def _ahead(reference: WordsReference, scores: Mapping[str, float]) -> str | None:
    """Return a sentence if a bag of words is better than the tuned model in accuracy and macro F1; otherwise ``None``."""
    if reference.accuracy is None or reference.macro_f1 is None:
        return None
    accuracy = scores["accuracy"]
    if reference.accuracy <= accuracy or reference.macro_f1 <= scores.get("macro_f1", -1.0):
        return None
    figures = f"{reference.accuracy:.4f}, tuned model {accuracy:.4f}"
    return f"A bag of words is ahead on these rows ({figures}); a linear model may be enough."


def sample_row(after: Mapping[str, Any], before: str | None) -> dict[str, Any]:
    """Return id, prompt, correct answers as texts, and both predictions of a row.

    ``after`` is its record, see :func:`slzo.evaluation.held_out.score_held_out`, and ``before`` its prediction before training.
    """
    return {
        "id": after["id"],
        "prompt": after["prompt"],
        "gold": after["gold_texts"],
        "before": None if before is None else before.strip(),
        "after": after["prediction_text"].strip(),
    }
