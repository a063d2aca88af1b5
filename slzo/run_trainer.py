"""A trainer from Python that runs as the command line does."""

from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lightning.pytorch import Callback
from lightning.pytorch.loggers import TensorBoardLogger

from slzo.callbacks.last_checkpoint import AUTO_MONITOR, BestCheckpoint, LastCheckpoint
from slzo.callbacks.loss_guard import LossGuard
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.callbacks.run_report import RunReport
from slzo.callbacks.run_summary import RunSummary
from slzo.trainer import ZOTrainer

RUNS = "runs"
"""Folder above the runs."""

LOGGER_DEFAULTS: Mapping[str, Any] = MappingProxyType({"save_dir": RUNS, "name": "", "default_hp_metric": False})
TRAINER_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {
        "max_steps": 1000,
        "val_check_interval": 100,
        "check_val_every_n_epoch": None,
        "num_sanity_val_steps": 0,
        "log_every_n_steps": 10,
        "enable_model_summary": False,
    }
)
CHECKPOINT_DEFAULTS: Mapping[str, Any] = MappingProxyType(
    {"monitor": AUTO_MONITOR, "mode": "min", "filename": "step={step}", "auto_insert_metric_name": False}
)


def runs_below(root: str | PathLike[str]) -> str:
    """The folder of the runs for a ``trainer.default_root_dir``."""
    return str(Path(root) / RUNS)


def run_trainer(*callbacks: Callback, **options: Any) -> ZOTrainer:
    """A trainer whose runs land in ``runs/`` with profile, checkpoints, summary and page, as those of the command line.

    With ``default_root_dir`` that folder is below it.

    Args:
        callbacks: Beside the usual ones, or in the place of one of the same class, with other arguments.
        options: Of :class:`slzo.trainer.ZOTrainer`, where they are not to be the command line's defaults.
    """
    usual = [
        OutlierProfiler(),
        LossGuard(),
        BestCheckpoint(**CHECKPOINT_DEFAULTS),
        RunSummary(),
        LastCheckpoint(),
        RunReport(),
    ]
    own = {type(callback) for callback in callbacks}
    kept = [callback for callback in usual if type(callback) not in own]
    settings = {**TRAINER_DEFAULTS, **options}
    root = settings.get("default_root_dir")
    folder = {} if root is None else {"save_dir": runs_below(root)}
    settings.setdefault("logger", TensorBoardLogger(**{**LOGGER_DEFAULTS, **folder}))
    return ZOTrainer(callbacks=[*callbacks, *kept], **settings)
