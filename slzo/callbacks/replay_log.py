"""Keeps the log of a run's steps, and takes those again that a crash lost since the last checkpoint."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.optim import Optimizer

from slzo.checkpoint import CHECKPOINT_FORMAT, write_checkpoint
from slzo.console import say
from slzo.errors import SlzoError
from slzo.files import copy_file
from slzo.module import ZOModule
from slzo.step_log import NAME, START, StepLog, StepLogWriter, read_step_log
from slzo.zo.recorder import StepRecorder


class ReplayLog(Callback):
    """Writes each step's losses to ``zo_log`` in the run folder, some 35 bytes, as soon as it is done.

    A run that goes on from a checkpoint first takes the steps that the log has beyond it, without forward passes; not if an
    option that they depend on has changed. Estimators that differentiate have no log.
    """

    def __init__(self) -> None:
        self._writer: StepLogWriter | None = None
        self._lr = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin the log, with that of the run that is continued."""
        log_dir = trainer.log_dir  # a collective call: every process must make it
        if log_dir is None or not isinstance(pl_module, ZOModule) or getattr(trainer, "fast_dev_run", False):
            return
        if pl_module.estimator.differentiates:
            return
        settings = _settings(trainer, pl_module)
        before = trainer.strategy.broadcast(_log_before(trainer, settings))
        step, folder = trainer.global_step, Path(log_dir)
        if trainer.is_global_zero:
            if trainer.ckpt_path is None:
                write_checkpoint(_start(pl_module), folder / START)
            elif (first := Path(trainer.ckpt_path).parent.parent / START).is_file():
                copy_file(first, folder / START)
            begun = () if before is None else before.before(step)
            self._writer = StepLogWriter(folder / NAME, StepLog(settings, begun))
        known = {} if before is None else {number: r for number, r in before.steps.items() if number >= step}
        if known:
            say(f"Steps {step} to {max(known)} are in the log of the run: they are taken again from it.")
        pl_module.recorder = StepRecorder(pl_module.device, known, self._writer)

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note the learning rate: a scheduler sets the next one before the step ends."""
        self._lr = float(optimizer.param_groups[0]["lr"])

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the step."""
        if isinstance(pl_module, ZOModule) and pl_module.recorder is not None:
            step = trainer.global_step - 1
            pl_module.recorder.done(step, self._lr, pl_module.step_options.eps_at(step, trainer.max_steps))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the log."""
        self._close(pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Close the log."""
        self._close(pl_module)

    def _close(self, module: LightningModule) -> None:
        if isinstance(module, ZOModule):
            module.recorder = None
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _settings(trainer: Trainer, module: ZOModule) -> dict[str, Any]:
    """What the steps depend on, as JSON gives it back."""
    ignored = ("engine.", "max_nonfinite", "layer", "seed")
    options = {name: value for name, value in module.hparams.items() if not name.startswith(ignored)}
    choice = module.optimizer_choice
    total = None if choice.make_scheduler is None and module.step_options.eps_end is None else trainer.max_steps
    rows = module.datamodule.state_dict()
    del rows["batch_size"]
    rows["rows_a_step"] = module.datamodule.rows_a_step
    found = {
        "model": {**options, "noise_seed": module.noise_seed, "layer": module.layer},
        "scope": module.scope_settings,
        "optimizer": choice.settings,
        "data": rows,
        "max_steps": total,
    }
    return dict(json.loads(json.dumps(found, default=str)))


def _log_before(trainer: Trainer, settings: Mapping[str, Any]) -> StepLog | None:
    """The log of the run that is continued; ``None`` where there is none, it is of other steps, or another process reads it."""
    if trainer.ckpt_path is None or not trainer.is_global_zero:
        return None
    folder = Path(trainer.ckpt_path).parent.parent
    if not (folder / NAME).is_file():
        return None
    try:
        log = read_step_log(folder / NAME)
    except SlzoError as error:
        say(f"{error}; its steps are not taken from it")
        return None
    if log.settings != settings:
        say("Options that steps depend on have changed: what the log of the run has beyond the checkpoint is not used.")
        return None
    return log


def _start(module: ZOModule) -> dict[str, Any]:
    """A checkpoint of the first weights without those that the base model has."""
    assert module.tuned_model is not None
    content: dict[str, Any] = {
        "global_step": 0,
        "hyper_parameters": dict(module.hparams),
        "pytorch-lightning_version": lightning.__version__,
    }
    module.on_save_checkpoint(content)
    content["state_dict"] = {} if module.tuned_model.adapter is None else module.state_dict()
    assert content["slzo"]["format"] == CHECKPOINT_FORMAT
    return content
