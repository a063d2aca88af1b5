"""Scores held-out rows before and after training and writes the summary of a run."""

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.callbacks.kept_weights import kept_weights
from slzo.callbacks.last_checkpoint import LastCheckpoint
from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.memory_planner import MemoryPlanner
from slzo.callbacks.next_command import RunFacts, next_command
from slzo.callbacks.score_change import ScoreChange, dev_loss, is_doubtful, score_change, verdict
from slzo.callbacks.step_watch import StepWatch
from slzo.callbacks.use_commands import use_commands
from slzo.console import say
from slzo.data.batch import EvalBatch
from slzo.datamodule import Judge
from slzo.evaluation.evaluator import Outcome, gold_losses, score_rows
from slzo.evaluation.metrics import perplexity_by_row, row_score
from slzo.files import write_json
from slzo.module import ZOModule
from slzo.rewards.registry import PERPLEXITY
from slzo.runtime import of_all_processes, peak_memory_gb

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Scores:
    """Held-out rows scored once.

    Attributes:
        metrics: Each metric of the task, by name.
        rows: What each row scores in the metric that sums the run up, by its id (a perplexity: its part in it); empty where that
            is no mean over rows.
    """

    metrics: dict[str, float]
    rows: dict[str, float]


class RunSummary(Callback):
    """Ends a run with what was tuned, what it brought, how long it took and where the files are.

    Where the held-out score fell, or moved by no more than its standard error, or the dev loss rose, that comes first, with the
    command to try next.

    Args:
        test_before: Score the held-out rows before training too.
    """

    def __init__(self, test_before: bool = True) -> None:
        self.test_before = test_before
        self._started = time.monotonic()
        self._train_started = self._started
        self._before: Scores | None = None
        self.row_seconds: float | None = None  # that scoring a held-out row took
        self._validations: list[dict[str, float | None]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the untuned model, once; a resumed run has the figure from its checkpoint."""
        wanted = self.test_before and self._before is None and not getattr(trainer, "fast_dev_run", False)
        if wanted and isinstance(pl_module, ZOModule) and not pl_module.resumed:
            begun = time.monotonic()
            self._before = _score(pl_module, "before training")
            splits = pl_module.datamodule.splits
            _log_scores(trainer, self._before)
            self.row_seconds = (time.monotonic() - begun) / max(1, len(splits.test) if splits else 0)
        self._validations = []
        self._train_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the dev rows' score took."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not isinstance(pl_module, ZOModule):
            return
        loss = pl_module.datamodule.judge.distance(trainer.callback_metrics, "val/")
        self._validations.append(
            {
                "step": trainer.global_step,
                "evaluations": pl_module.num_evaluations,
                "seconds": round(time.monotonic() - self._train_started, 4),
                "loss": loss if math.isfinite(loss) else None,
            }
        )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the best checkpoint, show and write the summary."""
        if (
            not isinstance(pl_module, ZOModule)
            or pl_module.tuned_model is None
            or getattr(trainer, "fast_dev_run", False)
            or trainer.interrupted
        ):
            return
        train_seconds = time.monotonic() - self._train_started
        best = str(trainer.strategy.broadcast(getattr(trainer.checkpoint_callback, "best_model_path", "")))
        after = _score_checkpoint(pl_module, best)
        _log_scores(trainer, after)
        datamodule = pl_module.datamodule
        metric = datamodule.judge.metric
        before = self._before.metrics if self._before is not None else {}
        num_rows = len(datamodule.splits.test) if datamodule.splits else 0
        change = _change(datamodule.judge, self._before, after, num_rows)
        losses = dev_loss(self._validations, datamodule.judge.words)
        run_dir = trainer.log_dir  # a collective call: every process must make it
        doubtful = is_doubtful(change, losses)
        facts = _facts(trainer, pl_module, run_dir, best)
        summary = {
            "model": pl_module.model_name,
            "task": datamodule.task.name,
            "dominant_layer": pl_module.layer,
            "layer_chosen_by": pl_module.layer_origin,
            "num_layers": pl_module.parts.num_layers,
            "scope": pl_module.scope.describe(),
            "estimator": pl_module.estimator.describe(),
            "optimizer": pl_module.optimizer_choice.name,
            "lr": pl_module.optimizer_choice.settings["lr"],
            "lr_at_end": trainer.optimizers[0].param_groups[0]["lr"],
            "eps": pl_module.step_options.eps,
            "metric": metric,
            "score_before": before.get(metric),
            "score_after": after.metrics[metric],
            "score_change": None if change is None else change.change,
            "score_change_standard_error": None if change is None else change.standard_error,
            "score_change_paired": None if change is None else change.paired,
            "verdict": verdict(change, losses),
            "next": next_command(change, losses, facts) if doubtful else None,
            "use": use_commands(facts.best, facts.config is not None),
            "scores_before": before,
            "scores_after": after.metrics,
            "num_rows": num_rows,
            "steps": trainer.global_step,
            "evaluations": pl_module.num_evaluations,
            "skipped_steps": pl_module.num_nonfinite,
            "times_taken_back": _times_taken_back(trainer),
            "loss_spikes": next((c.spikes for c in trainer.callbacks if isinstance(c, StepWatch)), {"number": 0}),  # type: ignore[attr-defined]
            "seconds": round(time.monotonic() - self._started, 2),
            "train_seconds": round(train_seconds, 4),
            "validations": self._validations,  # those of this process: a resumed run has only its own
            "planned_memory_gb": _planned(trainer),
            "peak_memory_gb": round(peak_memory_gb(pl_module.device), 3),
            "tuned_parameters": pl_module.tuned_model.tensors.num_elements,
            "total_parameters": pl_module.model.num_parameters(),
            "seed": pl_module.noise_seed,
            "best_checkpoint": best or None,
            "command": getattr(trainer, "command_line", None),
            "run_dir": run_dir,
        }
        if trainer.is_global_zero:
            _write(trainer, summary)
            say(format_summary(summary))

    def state_dict(self) -> dict[str, Any]:
        """The score before training, and that of each row."""
        before = self._before
        return {"before": before and before.metrics, "rows_before": before and before.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the score before training from a checkpoint; those of former versions have none of each row."""
        metrics = state_dict["before"]
        self._before = None if metrics is None else Scores(metrics, state_dict.get("rows_before") or {})


def _planned(trainer: Trainer) -> float | None:
    """The estimate of the peak, GiB; ``None`` where the model had been loaded before."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    plan = next((callback.plan for callback in callbacks if isinstance(callback, MemoryPlanner)), None)
    return None if plan is None else round(plan.total / 2**30, 3)


def _log_scores(trainer: Trainer, scores: Scores) -> None:
    """Give every logger the held-out scores, at the step that the run is at."""
    for logger in trainer.loggers:
        logger.log_metrics({f"test/{name}": value for name, value in scores.metrics.items()}, step=trainer.global_step)
        logger.save()


def _times_taken_back(trainer: Trainer) -> int:
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    return sum(callback.times for callback in callbacks if isinstance(callback, LossGuard))


def _change(judge: Judge, before: Scores | None, after: Scores, num_rows: int) -> ScoreChange | None:
    """What became of the metric that sums the run up; ``None`` if it is not known before, or not a number."""
    metric = judge.metric
    if before is None or not math.isfinite(before.metrics.get(metric, math.nan) + after.metrics[metric]):
        return None
    scores, rows = (before.metrics[metric], after.metrics[metric]), (before.rows, after.rows)
    return score_change(metric, scores, rows, num_rows, judge.lower_is_better)


def _facts(trainer: Trainer, module: ZOModule, run_dir: str | None, best: str) -> RunFacts:
    """What the advice depends on."""
    folder = None if run_dir is None else Path(run_dir)
    config = None if folder is None else folder / "config.yaml"
    keeps_last = any(isinstance(callback, LastCheckpoint) for callback in trainer.callbacks)  # type: ignore[attr-defined]
    limit = "max_steps" if trainer.max_steps > 0 else "max_epochs"
    data = module.datamodule
    num_rows = len(data.splits.test) if data.splits else 0
    return RunFacts(
        config=str(config) if config is not None and config.is_file() else None,
        last=str(folder / "checkpoints" / "last.ckpt") if folder is not None and keeps_last else None,
        best=best or None,
        limit=limit,
        limit_value=int(getattr(trainer, limit) or 0),
        layer=module.layer if module.scope.needs_layer else None,
        more_rows=4 * num_rows if num_rows == data.num_test else None,  # half of the standard error
    )


def _score_checkpoint(module: ZOModule, best: str) -> Scores:
    """Score the best checkpoint, or the last weights if there is none, and leave the module with its last weights."""
    with kept_weights(module, best) as kept:
        return _score(module, f"after training, {Path(best).name if kept else 'last weights'}")


def _score(module: ZOModule, when: str) -> Scores:
    """The task's metrics on the held-out rows."""
    datamodule = module.datamodule
    assert datamodule.splits is not None
    say(f"Scoring {len(datamodule.splits.test)} held-out rows {when} ...")
    rows: list[tuple[str, float]] = []
    losses: list[tuple[str, tuple[float, float]]] = []
    metric = datamodule.judge.metric

    def keep(batch: EvalBatch, outcome: Outcome) -> None:
        if metric == PERPLEXITY:
            losses.extend(gold_losses(batch, outcome).items())
            return
        predictions: Sequence[int | str] = outcome.predictions
        rewards = outcome.rewarded.totals if outcome.rewarded is not None and metric == "reward" else None
        for place, (example, prediction) in enumerate(zip(batch.examples, predictions, strict=True)):
            score = row_score(metric, example, prediction) if rewards is None else rewards[place]
            if score is not None and math.isfinite(score):
                rows.append((example.id, score))

    found = score_rows(
        module.evaluator,
        datamodule.test_dataloader(),
        datamodule.make_metrics(),
        seen=keep,
        also=datamodule.also,
    )
    metrics = {name: value for name, value in found.items() if name != "loss"}
    by_row = dict(of_all_processes(rows)) if metric != PERPLEXITY else perplexity_by_row(dict(of_all_processes(losses)))
    return Scores(metrics, by_row)


def _write(trainer: Trainer, summary: dict[str, Any]) -> None:
    if summary["run_dir"] is None:
        return
    write_json(Path(summary["run_dir"]) / SUMMARY_FILE, summary)
    if isinstance(trainer.logger, TensorBoardLogger):
        metrics = {f"test/{name}": value for name, value in summary["scores_after"].items()}
        trainer.logger.log_hyperparams(dict(trainer.lightning_module.hparams), metrics=metrics)


def format_summary(summary: dict[str, Any]) -> str:
    """The summary in a few lines, what should not be missed first."""
    frozen = summary["total_parameters"] - summary["tuned_parameters"]
    before = summary["score_before"]
    change = "" if before is None else f"{before:.4f} -> "
    layer = summary["dominant_layer"]
    lines = [""]
    if summary["next"] is not None:
        lines += [summary["verdict"] or "", f"Next       {summary['next']}", ""]
    lines.append(f"Scope      {summary['scope']}, {summary['estimator']}, {summary['optimizer']}")
    if layer is not None:
        lines.append(f"Layer      {layer} of {summary['num_layers']}: {summary['layer_chosen_by']}")
    lines += [
        f"Parameters {summary['tuned_parameters']:,} tuned, {frozen:,} frozen",
        f"Score      {summary['metric']} {change}{summary['score_after']:.4f} on {summary['num_rows']} held-out rows",
        f"Time       {summary['seconds']:.0f} s in all, {summary['steps']} steps in {summary['train_seconds']:.0f} s",
    ]
    if summary.get("planned_memory_gb") is not None:
        lines.append(
            f"Memory     {summary['peak_memory_gb']:.2f} GiB at most, {summary['planned_memory_gb']:.2f} planned"
        )
    if summary["times_taken_back"]:
        lines.append(
            "Taken back once, after a jump of the dev loss; the rate was halved"
            if summary["times_taken_back"] == 1
            else f"Taken back {summary['times_taken_back']} times, after jumps of the dev loss; the rate was halved each time"
        )
    if summary["skipped_steps"]:
        lines.append(f"Skipped    {summary['skipped_steps']} steps without a finite loss")
    spikes = summary["loss_spikes"]
    if spikes["number"]:
        lines.append(
            f"Spikes     {spikes['number']} steps with a loss far above the usual, the largest {spikes['loss']:.4g} at step "
            f"{spikes['step']}, usual {spikes['usual']:.4g}"
        )
    if summary["run_dir"]:
        lines.append(f"Files      {summary['run_dir']}")
    if summary["best_checkpoint"]:
        lines.append(f"Checkpoint {summary['best_checkpoint']}")
    lines += [f"{'' if number else 'Use it':10s} {command}" for number, command in enumerate(summary["use"])]
    return "\n".join(lines)
