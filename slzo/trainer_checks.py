"""Refuses trainer options that would fail late, do nothing or never end, before anything is loaded."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint

from slzo.utils.errors import SlzoError

_LAUNCHED_MOST = 64


def check_trainer_options(options: Mapping[str, Any]) -> None:
    """Refuse arguments of the Trainer.

    Raises:
        SlzoError: With the option and what is allowed.
    """
    for name in ("check_val_every_n_epoch", "log_every_n_steps"):
        value = options.get(name)
        if isinstance(value, int) and value < (name == "check_val_every_n_epoch"):
            raise SlzoError(f"trainer.{name} {value}: must be at least {int(name == 'check_val_every_n_epoch')}")
    for name, unlimited in (("max_steps", -1), ("max_epochs", -1), ("limit_train_batches", None)):
        value = options.get(name)
        if value is not None and value != unlimited and not isinstance(value, bool) and value == 0:
            raise SlzoError(f"trainer.{name} 0: nothing would be trained; give more, or use `slzo test` to score only")
    devices = options.get("devices")
    most = max(_LAUNCHED_MOST, os.cpu_count() or 1, torch.cuda.device_count())
    if str(devices).isdecimal() and int(str(devices)) > most:
        raise SlzoError(f"trainer.devices {devices}: each is a process of its own; give at most {most}")


def check_callbacks(callbacks: Sequence[Callback], metrics: Sequence[str]) -> None:
    """Refuse checkpoints and stops that watch, or are named after, what does not exist; ``metrics`` of validations exist.

    Raises:
        SlzoError: With the option and what is allowed.
    """
    for callback in callbacks:
        option = "checkpoint" if type(callback).__name__ == "BestCheckpoint" else type(callback).__name__
        monitor = getattr(callback, "monitor", None)
        own = all(type(each).__module__.partition(".")[0] in ("slzo", "lightning") for each in callbacks)
        # other callbacks may log names of their own, and training steps log many
        if own and isinstance(monitor, str) and monitor not in metrics and not monitor.startswith("train/"):
            raise SlzoError(f"{option}.monitor {monitor!r}: no such metric; choose one of {', '.join(metrics)}")
        if isinstance(callback, ModelCheckpoint):
            _check_files(callback, option, metrics)


def _check_files(callback: ModelCheckpoint, option: str, metrics: Sequence[str]) -> None:
    known = {name: torch.tensor(0.0) for name in metrics}
    try:
        callback.format_checkpoint_name({**known, "step": torch.tensor(0), "epoch": torch.tensor(0)})
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise SlzoError(
            f"{option}.filename {callback.filename!r}: {error}; write metrics as {{NAME}} or with a format, like {{step:05d}}"
        ) from error
    if callback.dirpath is not None and Path(callback.dirpath).exists() and not Path(callback.dirpath).is_dir():
        raise SlzoError(f"{option}.dirpath {str(callback.dirpath)!r}: is a file; give a folder, or leave it out")
