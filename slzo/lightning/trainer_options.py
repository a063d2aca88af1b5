"""Options of the trainer: slzo's defaults, and checks before anything is loaded."""

import os
from collections.abc import Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, Timer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.plugins.io import AsyncCheckpointIO
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from slzo.callbacks.checkpoints import AUTO_MONITOR, BestCheckpoint, LastCheckpoint
from slzo.callbacks.time_limit import TimeLimit
from slzo.lightning.strategy import SHARDED
from slzo.lightning.trainer_checks import check_overfit_batches, check_precision, check_supported
from slzo.private.lightning import copies_process, saves_by_time
from slzo.utils.argument_checks import check_at_least
from slzo.utils.console import rank_zero_warn
from slzo.utils.errors import SlzoError, short_repr
from slzo.utils.files import check_local

TRAINER_DEFAULTS: Mapping[str, Any] = {
    "max_steps": 1000,
    "val_check_interval": 100,
    "check_val_every_n_epoch": None,
    "num_sanity_val_steps": 0,
    "log_every_n_steps": 10,
    "enable_model_summary": False,
}
_SHARDING = ("FSDPStrategy", "DeepSpeedStrategy", "ModelParallelStrategy")
_MAX_LAUNCHED = 64
STEP_METRICS = "train/"


def limit_defaults(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults that follow from other options.

    A run without a number of steps is limited by the time or the epochs. One with ``max_time`` has the steps and validations of
    its plan. With ``check_val_every_n_epoch`` the dev rows are scored at the end of an epoch.
    """
    by_epoch = {} if options.get("check_val_every_n_epoch") is None else {"val_check_interval": 1.0}
    if options.get("max_steps", -1) != -1:
        return by_epoch
    if options.get("max_time") is not None:
        # validations as rare as the time is long, which the plan makes more frequent
        return {"max_steps": -1, **(by_epoch or {"val_check_interval": options["max_time"]})}
    return by_epoch if options.get("max_epochs") is None else {"max_steps": -1, **by_epoch}


def take_time_limit(options: dict[str, Any]) -> TimeLimit | None:
    """Take the time from the options, and validations by time with it, which Lightning would count from the first step on.

    Raises:
        SlzoError: A time cannot be read.
    """
    if options.get("max_time") is None:
        return None
    seconds, every = _seconds("max_time", options["max_time"]), options["val_check_interval"]
    if options.get("max_epochs") is None:
        options["max_epochs"] = -1
    options["max_time"] = None
    if every is None or isinstance(every, int | float):
        return TimeLimit(seconds)
    if options["check_val_every_n_epoch"] is None:
        options["val_check_interval"] = TRAINER_DEFAULTS["val_check_interval"]  # until the plan sets it
    return TimeLimit(seconds, _seconds("val_check_interval", every))


def _seconds(name: str, value: Any) -> float:
    try:
        seconds = Timer(value).time_remaining()
    except (MisconfigurationException, TypeError, OverflowError) as error:
        raise SlzoError(
            f"trainer.{name} {value!r}: not a time; give DD:HH:MM:SS, such as 00:00:10:00 for ten minutes, or {{minutes: 10}}"
        ) from error
    if seconds is None or seconds <= 0:
        raise SlzoError(
            f"trainer.{name} {value!r}: must be longer than 0; give DD:HH:MM:SS, such as 00:00:10:00 for ten minutes"
        )
    return seconds


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that would fail late, do nothing or never end, before anything is loaded.

    Raises:
        SlzoError: An option cannot be used.
    """
    _check_objects("callbacks", options.get("callbacks"), Callback, "EarlyStopping('val/loss')")
    if not isinstance(options.get("logger"), bool):
        _check_objects("logger", options.get("logger"), Logger, "CSVLogger('logs')")
    check_precision(options.get("precision"))
    if options.get("barebones"):
        raise SlzoError("trainer.barebones: slzo's callbacks log and save; leave it out")
    if options.get("gradient_clip_val") is not None:
        raise SlzoError(
            f"trainer.gradient_clip_val {options['gradient_clip_val']}: slzo does not clip gradients by their norm; leave it "
            "out, and lower model.optimizer.lr if steps are too large"
        )
    if options.get("accumulate_grad_batches", 1) != 1:
        raise SlzoError(
            f"trainer.accumulate_grad_batches {options['accumulate_grad_batches']}: a forward-only step needs no accumulation; "
            "raise data.batch_size; data.tokens_per_pass runs a large batch in parts"
        )
    check_overfit_batches(options.get("overfit_batches"))
    every = options.get("val_check_interval")
    if every == 0:
        raise SlzoError("trainer.val_check_interval 0: give the number of steps between two validations, at least 1")
    if isinstance(every, float) and options.get("check_val_every_n_epoch") is None:
        raise SlzoError(
            f"trainer.val_check_interval {every}: a fraction of an epoch needs trainer.check_val_every_n_epoch 1; set it, or "
            "give a number of steps"
        )
    _check_strategy(options.get("strategy"))
    for name, least in (("check_val_every_n_epoch", 1), ("log_every_n_steps", 0)):
        value = options.get(name)
        if isinstance(value, int):
            check_at_least(f"trainer.{name}", value, least)
    for name in ("max_steps", "max_epochs", "min_steps", "min_epochs"):
        value = options.get(name, 1)
        is_number = isinstance(value, Integral) and not isinstance(value, bool)
        if not is_number and (value is not None or name == "max_steps"):
            raise SlzoError(f"trainer.{name} {short_repr(value)}: is a {type(value).__name__}; give a whole number")
    for name in ("max_steps", "max_epochs", "limit_train_batches"):
        value = options.get(name)
        if value == 0 and value is not False:
            raise SlzoError(f"trainer.{name} 0: nothing would be trained; give more, or use `slzo test` to score only")
    if options.get("max_steps") == -1 and options.get("max_time") is None and options.get("max_epochs") is None:
        raise SlzoError("trainer.max_steps -1: nothing ends the run; give trainer.max_time or trainer.max_epochs")
    if options.get("max_time") is not None:
        for name in ("min_steps", "min_epochs"):
            if options.get(name):
                raise SlzoError(
                    f"trainer.{name} {options[name]}: trainer.max_time may leave time for fewer steps; leave one of them out"
                )
    least_steps, most_steps = options.get("min_steps"), options.get("max_steps", -1)
    if least_steps is not None and -1 < most_steps < least_steps:
        raise SlzoError(f"trainer.min_steps {least_steps}: is more than trainer.max_steps {most_steps}; lower it")
    devices = options.get("devices")
    most = max(_MAX_LAUNCHED, os.cpu_count() or 1, torch.cuda.device_count())
    if str(devices).isdecimal() and int(str(devices)) > most:
        raise SlzoError(f"trainer.devices {devices}: each device has a process of its own; give at most {most}")


def _check_objects(name: str, given: Any, kind: type, example: str) -> None:
    """Check the class of one or several objects, which Lightning does not check."""
    for each in listed(given):
        if not isinstance(each, kind):
            raise SlzoError(
                f"trainer.{name} {short_repr(each)}: is not a {kind.__name__} of lightning.pytorch; give one, such as {example}"
            )


def listed(given: Any) -> list[Any]:
    """Return one or several callbacks, plugins or loggers as a list."""
    return list(given) if isinstance(given, list | tuple) else [] if given is None else [given]


def _check_strategy(strategy: Any) -> None:
    name = strategy if isinstance(strategy, str) else type(strategy).__name__
    if name.rpartition(".")[2] in _SHARDING or name.startswith(("fsdp", "deepspeed")):
        raise SlzoError(
            f"trainer.strategy {name!r}: not supported, as its processes must run every layer equally often; use {SHARDED}, "
            "whose processes share the frozen layers, or one process with model.device_map auto, which spreads them over all GPUs"
        )


def check_launcher(trainer: Trainer, strategy: Any) -> None:
    """Refuse a strategy whose processes are copies of this one, however it was given; ``strategy`` is the option.

    Raises:
        SlzoError: The trainer has such a strategy.
    """
    if copies_process(trainer.strategy.launcher):
        name = strategy if isinstance(strategy, str) else type(trainer.strategy).__name__
        raise SlzoError(
            f"trainer.strategy {name!r}: it copies this process, which slzo does not support; use ddp in a script or on the "
            "command line, or one device in a notebook"
        )


def check_checkpoint_io(checkpoint_io: Any) -> None:
    """Refuse a plugin that writes checkpoints in a thread of its own: a run renames and reads a file once it is saved.

    Raises:
        SlzoError: It is such a plugin, or one around it.
    """
    while checkpoint_io is not None:
        if isinstance(checkpoint_io, AsyncCheckpointIO):
            raise SlzoError(
                f"trainer.plugins {type(checkpoint_io).__name__}: a run renames and reads its checkpoints at once; leave it out"
            )
        checkpoint_io = getattr(checkpoint_io, "checkpoint_io", None)  # of a plugin around another one


def check_saving(callbacks: Sequence[Callback], saves: bool, writes: bool) -> None:
    """Refuse a user's callback that saves checkpoints in a run that does not, or that would replace ``last.ckpt``.

    Raises:
        SlzoError: The run has ``enable_checkpointing=False``. Or the callback saves by time, which Lightning ignores in manual
            optimization. Or it has no folder of its own, and the run has no logger, or the callback has ``save_last``.
    """
    for callback in callbacks:
        if not isinstance(callback, Checkpoint) or isinstance(callback, BestCheckpoint | LastCheckpoint):
            continue
        name = type(callback).__name__
        if not saves:
            raise SlzoError(
                f"trainer.callbacks {name}: it saves checkpoints; leave out trainer.enable_checkpointing false"
            )
        if saves_by_time(callback):
            raise SlzoError(
                f"trainer.callbacks {name}.train_time_interval: would save nothing, since steps are optimized manually; leave it "
                "out, and set last_checkpoint.every_minutes"
            )
        if not writes and getattr(callback, "dirpath", None) is None:
            raise SlzoError(f"trainer.callbacks {name}: without a logger it has no folder; give it a dirpath")
        if getattr(callback, "save_last", None) and getattr(callback, "dirpath", None) is None:
            raise SlzoError(
                f"trainer.callbacks {name}.save_last: last.ckpt is written by the run itself, see last_checkpoint; leave it "
                "out, or give a dirpath"
            )


def check_callbacks(
    callbacks: Sequence[Callback], metrics: Sequence[str], maximized: Sequence[str], logs_more: bool
) -> None:
    """Refuse callbacks that do not work with slzo's steps, and names of metrics that do not exist; warn of a wrong mode.

    ``metrics`` lists the metrics of the dev rows, and ``maximized`` those whose larger values are better; with ``logs_more`` the
    module may log others.

    Raises:
        SlzoError: There is no such metric, or a file cannot be named.
    """
    check_supported(callbacks)
    check_monitors(callbacks, [*metrics, "loss"], logs_more, of_steps=False)
    for callback in callbacks:
        option, monitor = _option_of(callback), getattr(callback, "monitor", None)
        chooses_mode = isinstance(callback, BestCheckpoint) and callback.chooses_mode
        if monitor in maximized and getattr(callback, "mode", None) == "min" and not chooses_mode:
            rank_zero_warn(f"{option}.mode min: larger values of {monitor} are better; set {option}.mode to max")
        if isinstance(callback, ModelCheckpoint):
            _check_files(callback, option, metrics)


def check_monitors(callbacks: Sequence[Callback], metrics: Sequence[str], logs_more: bool, of_steps: bool) -> None:
    """Refuse monitors of metrics that are not among ``metrics``.

    With ``of_steps`` it checks monitors of what training steps log, ``train/...``, otherwise all others. With ``logs_more``, or
    with callbacks of the user, which may log metrics of their own, none is refused.

    Raises:
        SlzoError: There is no such metric.
    """
    if logs_more or any(type(each).__module__.partition(".")[0] not in ("slzo", "lightning") for each in callbacks):
        return
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or monitor in (AUTO_MONITOR, *metrics):
            continue
        if monitor.startswith(STEP_METRICS) == of_steps:
            raise SlzoError(
                f"{_option_of(callback)}.monitor {monitor!r}: no such metric; choose one of {', '.join(metrics)}"
            )


def _option_of(callback: Callback) -> str:
    return "checkpoint" if isinstance(callback, BestCheckpoint) else type(callback).__name__


def _check_files(callback: ModelCheckpoint, option: str, metrics: Sequence[str]) -> None:
    known = {name: torch.tensor(0.0) for name in metrics}
    try:
        callback.format_checkpoint_name({**known, "step": torch.tensor(0), "epoch": torch.tensor(0)})
    except (ValueError, KeyError, IndexError, AttributeError) as error:
        raise SlzoError(
            f"{option}.filename {callback.filename!r}: {error}; write metrics as {{NAME}} or with a format, like {{step:05d}}"
        ) from error
    check_local(f"{option}.dirpath", callback.dirpath)
    if callback.dirpath is not None and Path(callback.dirpath).exists() and not Path(callback.dirpath).is_dir():
        raise SlzoError(f"{option}.dirpath {str(callback.dirpath)!r}: is a file; give a folder, or leave it out")
