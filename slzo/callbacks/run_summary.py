"""Scores held-out rows before and after training and writes the summary of a run."""

import json
import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.callbacks.step_watch import StepWatch
from slzo.checkpoint import read_checkpoint
from slzo.console import say
from slzo.evaluation.evaluator import score_rows
from slzo.module import ZOModule
from slzo.runtime import peak_memory_gb

SUMMARY_FILE = "summary.json"


class RunSummary(Callback):
    """Ends a run with what was tuned, what it brought, how long it took and where the files are.

    Args:
        test_before: Score the held-out rows before training too.
    """

    def __init__(self, test_before: bool = True) -> None:
        self.test_before = test_before
        self._started = time.monotonic()
        self._train_started = self._started
        self._before: dict[str, float] | None = None
        self._validations: list[dict[str, float | None]] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the untuned model, once; a resumed run has the figure from its checkpoint."""
        wanted = self.test_before and self._before is None and not getattr(trainer, "fast_dev_run", False)
        if wanted and isinstance(pl_module, ZOModule) and not pl_module.resumed:
            self._before = _score(pl_module, "before training")
        self._validations = []
        self._train_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what the dev rows' score took."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not isinstance(pl_module, ZOModule):
            return
        loss = float(trainer.callback_metrics.get("val/loss", math.nan))
        self._validations.append(
            {
                "step": trainer.global_step,
                "evaluations": pl_module.num_evaluations,
                "seconds": round(time.monotonic() - self._train_started, 2),
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
        datamodule = pl_module.datamodule
        metric = datamodule.task.metric
        before = self._before or {}
        summary = {
            "model": pl_module.model_name,
            "task": datamodule.task.name,
            "dominant_layer": pl_module.layer,
            "layer_chosen_by": pl_module.layer_origin,
            "num_layers": pl_module.parts.num_layers,
            "scope": pl_module.scope.describe(),
            "estimator": pl_module.estimator.describe(),
            "optimizer": pl_module.optimizer_choice.name,
            "lr": pl_module.optimizer_choice.lr,
            "eps": pl_module.step_options.eps,
            "metric": metric,
            "score_before": before.get(metric),
            "score_after": after[metric],
            "scores_before": before,
            "scores_after": after,
            "num_rows": len(datamodule.splits.test) if datamodule.splits else 0,
            "steps": trainer.global_step,
            "evaluations": pl_module.num_evaluations,
            "skipped_steps": pl_module.num_nonfinite,
            "loss_spikes": next((c.spikes for c in trainer.callbacks if isinstance(c, StepWatch)), {"number": 0}),  # type: ignore[attr-defined]
            "seconds": round(time.monotonic() - self._started, 2),
            "train_seconds": round(train_seconds, 2),
            "validations": self._validations,  # those of this process: a resumed run has only its own
            "peak_memory_gb": round(peak_memory_gb(pl_module.device), 3),
            "tuned_parameters": pl_module.tuned_model.tensors.num_elements,
            "total_parameters": sum(p.numel() for p in pl_module.model.parameters()),
            "seed": pl_module.noise_seed,
            "best_checkpoint": best or None,
            "run_dir": trainer.log_dir,  # a collective call: every process must make it
        }
        if trainer.is_global_zero:
            _write(trainer, summary)
            say(format_summary(summary))

    def state_dict(self) -> dict[str, Any]:
        """The score before training."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the score before training from a checkpoint."""
        self._before = state_dict["before"]


def _score_checkpoint(module: ZOModule, best: str) -> dict[str, float]:
    """Score the best checkpoint, or the last weights if there is none, and leave the module with its last weights."""
    if not best or not Path(best).is_file():
        return _score(module, "after training, last weights")
    last = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    try:
        module.load_state_dict(read_checkpoint(best).content["state_dict"])
        return _score(module, f"after training, {Path(best).name}")
    finally:
        module.load_state_dict(last)


def _score(module: ZOModule, when: str) -> dict[str, float]:
    """The task's metrics on the held-out rows."""
    datamodule = module.datamodule
    assert datamodule.splits is not None
    say(f"Scoring {len(datamodule.splits.test)} held-out rows {when} ...")
    found = score_rows(module.evaluator, datamodule.test_dataloader(), datamodule.make_metrics())
    return {name: value for name, value in found.items() if name != "loss"}


def _write(trainer: Trainer, summary: dict[str, Any]) -> None:
    if summary["run_dir"] is None:
        return
    folder = Path(summary["run_dir"])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / SUMMARY_FILE).write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if isinstance(trainer.logger, TensorBoardLogger):
        metrics = {f"test/{name}": value for name, value in summary["scores_after"].items()}
        trainer.logger.log_hyperparams(dict(trainer.lightning_module.hparams), metrics=metrics)


def format_summary(summary: dict[str, Any]) -> str:
    """The summary in a few lines."""
    frozen = summary["total_parameters"] - summary["tuned_parameters"]
    before = summary["score_before"]
    change = "" if before is None else f"{before:.4f} -> "
    layer = summary["dominant_layer"]
    lines = ["", f"Scope      {summary['scope']}, {summary['estimator']}, {summary['optimizer']}"]
    if layer is not None:
        lines.append(f"Layer      {layer} of {summary['num_layers']}: {summary['layer_chosen_by']}")
    lines += [
        f"Parameters {summary['tuned_parameters']:,} tuned, {frozen:,} frozen",
        f"Score      {summary['metric']} {change}{summary['score_after']:.4f} on {summary['num_rows']} held-out rows",
        f"Time       {summary['seconds']:.0f} s in all, {summary['steps']} steps in {summary['train_seconds']:.0f} s",
    ]
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
    return "\n".join(lines)
