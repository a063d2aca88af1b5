"""Writes the environment, the history, samples and the summary of a run to its folder."""

import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.callbacks.checkpoints import LastCheckpoint
from slzo.callbacks.hooks import zo_module
from slzo.callbacks.loss_guard import LossGuard
from slzo.fit import finish, score_test_rows
from slzo.lightning.trainer_state import callback_of, folder_of, is_quick
from slzo.module import ZOModule
from slzo.report.history import History
from slzo.report.run_facts import FitOutcome
from slzo.task_data import TaskData
from slzo.training.checkpoint_content import loaded_from_hub
from slzo.training.run import Prepared
from slzo.training.scored import scores_are_comparable
from slzo.training.time_plan import Passes
from slzo.utils.console import rank_zero_warn
from slzo.utils.environment import environment
from slzo.utils.files import write_json
from slzo.utils.run_layout import CHECKPOINTS_FOLDER, ENVIRONMENT_FILE, HISTORY_FILE, LAST_FILE
from slzo.utils.runtime import peak_memory_gb

_LEFT_OUT = {
    "dev": "its validations and its best state are left out",
    "test": "its held-out score before training is left out",
}


class RunRecord(Callback):
    """Writes the files of a run's folder and prints its summary.

    * ``environment.json`` when training begins: versions, commit, command, seeds, devices, threads, kernels, commits
      of the Hub.
    * ``history.json`` when training begins and after each validation: step, evaluations, seconds, loss, metrics and peak memory
      of each validation.
    * ``samples.json``, ``summary.json``, ``curves.png`` and ``report.html`` at the end, see :func:`slzo.fit.finish`.

    The held-out rows are scored with the untuned model before the first step, and with the best checkpoint at the end. It runs
    after the callbacks whose counts it reports.

    Checkpoints hold the record. A resumed run continues it, so that history and summary are those of the whole run.

    Args:
        test_before: Also score the held-out rows before training.
        reference: On classification tasks, also score a bag of words; needs scikit-learn.
    """

    def __init__(self, test_before: bool = True, reference: bool = True) -> None:
        self.test_before, self.reference = test_before, reference
        self._started = self._train_started = time.monotonic()
        self._history = History()  # of earlier fits and the runs that this one continues, and points of this run
        self._saved: Mapping[str, Any] | None = None
        self._is_comparable = {
            "dev": True,
            "test": True,
        }  # whether scores of the checkpoint can be compared with later ones
        self._device = torch.device("cpu")

    def begin(self) -> None:
        """Start the clock of a ``fit``. Without a call it starts when this object is made, or when the last ``fit`` ends."""
        self._started = time.monotonic()

    @property
    def passes(self) -> Passes:
        """What this callback scores besides validations."""
        return Passes(test_before=int(self.test_before), test_after=1)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        module = zo_module(pl_module)
        prepared = module.prepared
        folder, data, self._device = folder_of(trainer), module.datamodule, module.device
        for logger in trainer.loggers:
            if not isinstance(logger, TensorBoardLogger):  # TensorBoard shows each set of options as a separate run
                logger.log_hyperparams(_options(trainer, module))
        if folder is not None and trainer.is_global_zero:
            write_json(folder / ENVIRONMENT_FILE, {**environment(), **_environment_facts(trainer, module, prepared)})
        if prepared.resumed:
            self._history = History() if self._saved is None else History.from_dict(self._saved)
            if not self._is_comparable["dev"]:
                self._history.points.clear()
            if not self._is_comparable["test"]:
                self._history.before, self._history.samples = None, {}
        else:
            if trainer.global_step == 0:  # otherwise it is another fit of this trainer
                self._history = History()
            if self.test_before and self._history.before is None and not is_quick(trainer):
                self._score_before(trainer, prepared, data)
        self._write(trainer)
        self._train_started = time.monotonic()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        module = zo_module(pl_module)
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        distance = module.datamodule.selection_metric.distance(found, "val/")
        loss = found.pop("val/loss", math.nan)
        record = self._so_far()
        self._history.points.append(
            {
                "step": trainer.global_step,
                "evaluations": round(module.stepper.num_evaluations),
                "seconds": round(record.train_seconds, 4),
                "loss": loss if math.isfinite(loss) else None,
                "distance": distance if math.isfinite(distance) else None,
                "metrics": {name: value for name, value in found.items() if math.isfinite(value)},
                "peak_memory_gb": round(record.peak_memory_gb, 3),
            }
        )
        self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if is_quick(trainer) or trainer.interrupted:
            return
        module = zo_module(pl_module)
        outcome = self._outcome(trainer)
        summary = finish(module.prepared, module.datamodule, outcome, folder_of(trainer))
        self._history = replace(outcome.history, seconds=self._so_far().seconds)  # for another fit of this trainer
        self._started = self._train_started = time.monotonic()
        _log_scores(trainer, summary["scores_after"], {**module.hparams, **_options(trainer, module)})

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the log of losses; Lightning calls no hook of the module after an exception."""
        if isinstance(pl_module, ZOModule):
            pl_module.close_log()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Begin to count the seconds of another ``fit`` of the same trainer."""
        self._started = time.monotonic()

    def _score_before(self, trainer: Trainer, prepared: Prepared, data: TaskData) -> None:
        """Score the held-out rows with the untuned model, and keep some predictions."""
        scores, samples = score_test_rows(prepared, data, "before training", keep_prefix=True)
        self._history.before = scores
        self._history.samples = {place: record["prediction_text"] for place, record in samples.items()}
        _log_scores(trainer, scores.metrics)

    def _so_far(self) -> History:
        """Return the record with time and memory of this run added."""
        now, before = time.monotonic(), self._history
        return replace(
            before,
            seconds=before.seconds + now - self._started,
            train_seconds=before.train_seconds + now - self._train_started,
            peak_memory_gb=max(before.peak_memory_gb, peak_memory_gb(self._device)),
        )

    def _write(self, trainer: Trainer) -> None:
        """Write the history. A collective call."""
        folder = folder_of(trainer)
        if folder is not None and trainer.is_global_zero:
            write_json(folder / HISTORY_FILE, {"points": self._history.points})

    def _outcome(self, trainer: Trainer) -> FitOutcome:
        """Collect the results of the training for the summary. A collective call."""
        guard = callback_of(trainer, LossGuard)
        folder = folder_of(trainer)
        best = str(trainer.strategy.broadcast(getattr(trainer.checkpoint_callback, "best_model_path", "")))
        last = None
        if folder is not None and callback_of(trainer, LastCheckpoint) is not None:
            last = str(folder / CHECKPOINTS_FOLDER / LAST_FILE)
        by_steps = 0 < trainer.max_steps <= trainer.global_step or (trainer.max_epochs or 0) <= 0
        limit = "max_steps" if by_steps else "max_epochs"
        return FitOutcome(
            steps=trainer.global_step,
            lr=trainer.optimizers[0].param_groups[0]["lr"],
            best=best or None,
            last=last,
            history=self._so_far(),
            rollbacks=0 if guard is None else guard.rollbacks,
            limit=(limit, int(getattr(trainer, limit) or 0)),
            reference=self.reference,
        )

    def state_dict(self) -> dict[str, Any]:
        return asdict(self._so_far())

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Note which scores of the checkpoint's run can be compared with later ones."""
        if trainer.state.fn != "fit":
            return
        module = zo_module(pl_module)
        for split in self._is_comparable:
            self._is_comparable[split] = scores_are_comparable(checkpoint, module.prepared, module.datamodule, split)
        if left_out := [name for name, is_comparable in self._is_comparable.items() if not is_comparable]:
            rank_zero_warn(
                "rows, task or rewards are not those of the checkpoint's run, so its scores cannot be compared with later ones: "
                + " and ".join(_LEFT_OUT[name] for name in left_out)
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the record of a checkpoint for a resumed run; commands that score need none."""
        self._saved = state_dict


def _log_scores(trainer: Trainer, scores: Mapping[str, float], options: dict[str, Any] | None = None) -> None:
    """Log the held-out scores at the current step; TensorBoard shows the final ones next to the options."""
    metrics = {f"test/{name}": value for name, value in scores.items()}
    for logger in trainer.loggers:
        if options is not None and isinstance(logger, TensorBoardLogger):
            logger.log_hyperparams(options, metrics, trainer.global_step)  # logs the metrics too
        else:
            logger.log_metrics(metrics, step=trainer.global_step)
        logger.save()


def _options(trainer: Trainer, module: ZOModule) -> dict[str, Any]:
    """Return the options to log besides those of the model, which Lightning logs itself."""
    return {
        **module.datamodule.step_settings(),
        "trainer.max_steps": trainer.max_steps,
        "dominant_layer": module.stepper.model.layer,
        "noise_seed": module.stepper.seed,
    }


def _environment_facts(trainer: Trainer, module: ZOModule, prepared: Prepared) -> dict[str, Any]:
    data, base, parts = module.datamodule, prepared.model.base, prepared.model.parts
    return {
        "processes": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": str(module.device),
        "seeds": {"noise": prepared.stepper.seed, "rows": data.seed},
        "layer": prepared.model.layer,
        "onednn": parts.onednn,
        "packed": parts.packed,
        "base": {"sample": dict(base.sample), "tuned": dict(base.tuned)},
        "rows": {split: len(data.rows(split)) for split in ("train", "dev")},
        "hub": loaded_from_hub(prepared, data),
        "continued_from": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
    }
