"""Writes beside a run what its numbers depend on besides the config."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.environment import environment
from slzo.files import write_json
from slzo.module import ZOModule

NAME = "environment.json"
"""Of the file in a run's folder."""


class RunRecord(Callback):
    """Writes versions, commit, command, seeds, devices, threads and kernels of a training to ``environment.json``."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write it, and give loggers the options that are not the model's: Lightning gives them those."""
        if isinstance(pl_module, ZOModule):
            options = _options(trainer, pl_module)
            for logger in trainer.loggers:
                if not isinstance(logger, TensorBoardLogger):  # it shows each set of options as a run of its own
                    logger.log_hyperparams(options)
        log_dir = trainer.log_dir  # a collective call: every process must make it
        if log_dir is None or not isinstance(pl_module, ZOModule) or not trainer.is_global_zero:
            return
        write_json(Path(log_dir) / NAME, {**environment(), **_of_run(trainer, pl_module)})


def _options(trainer: Trainer, module: ZOModule) -> dict[str, Any]:
    rows = {f"data.{name}": value for name, value in module.datamodule.state_dict().items()}
    return {
        **rows,
        "trainer.max_steps": trainer.max_steps,
        "dominant_layer": module.layer,
        "noise_seed": module.noise_seed,
    }


def _of_run(trainer: Trainer, module: ZOModule) -> dict[str, Any]:
    assert module.tuned_model is not None
    datamodule, base = module.datamodule, module.tuned_model.base
    return {
        "processes": trainer.world_size,
        "strategy": type(trainer.strategy).__name__,
        "device": str(module.device),
        "seeds": {"noise": module.noise_seed, "rows": datamodule.seed},
        "layer": module.layer,
        "onednn": module.parts.onednn,
        "packed": module.parts.packed,
        "base": None if base is None else {"sample": dict(base.sample), "tuned": dict(base.tuned)},
        "rows": {split: len(datamodule.rows(split)) for split in ("train", "dev")},
        "continued_from": None if trainer.ckpt_path is None else str(trainer.ckpt_path),
    }
