"""Resumes a run from a checkpoint and from the log of the steps after it."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from itertools import chain
from typing import Any

import torch

from slzo.checkpoints.checkpoint import write_checkpoint
from slzo.checkpoints.metadata import CHECKPOINT_FORMAT
from slzo.checkpoints.step_log import NAME as STEP_LOG
from slzo.checkpoints.step_log import START, StepLog, StepLogWriter, StepRecord, read_step_log
from slzo.data.classes import common_candidates
from slzo.task_data import TaskData
from slzo.tasks.base import Kind
from slzo.tasks.registry import task_to_predict
from slzo.training.options import TrainingOptions
from slzo.training.run import Prepared, RunContext
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.environment import device_name, numerics
from slzo.utils.errors import SlzoError
from slzo.utils.files import copy_file
from slzo.utils.hub import model_commit
from slzo.utils.settings import differences, flat_settings

_RATE = "model.optimizer.lr"


def loaded_from_hub(prepared: Prepared, data: TaskData) -> dict[str, str | None]:
    """Return the Hub commit of the model, and name, configuration and commit of the data set.

    Entries are ``None`` for what is not from the Hub.
    """
    assert data.splits is not None
    source = data.splits.hub
    return {
        "model_commit": model_commit(prepared.options.model, prepared.untuned.model.name_or_path),
        "data_set": None if source is None else source.path,
        "data_config": None if source is None else source.config,
        "data_split": None if source is None else source.test,
        "data_commit": None if source is None else source.revision,
    }


def make_metadata(prepared: Prepared, data: TaskData) -> dict[str, Any]:
    """Return the metadata of a checkpoint, about its tensors and their model; only tensors and primitives."""
    options = prepared.options
    model = prepared.model
    assert data.splits is not None
    candidates = common_candidates(data.splits.train)
    return {
        "format": CHECKPOINT_FORMAT,
        **model.description(),
        **prepared.stepper.state_dict(),
        "model": options.model,
        "layer_reason": prepared.chosen.reason,
        "dtype": options.dtype,
        "quantization": options.quantization,
        "trust_remote_code": options.trust_remote_code,
        "noise_seed": prepared.stepper.seed,
        "onednn": model.parts.onednn,
        "task": task_to_predict(data.task),
        "chat": data.task.chat is not None,
        "system_prompt": None if data.task.chat is None else data.task.chat.system,
        "chat_template": data.chat_template,
        "candidates": None if candidates is None else list(candidates),
        "max_new_tokens": data.task.max_new_tokens,
        "stop": list(data.decoding.stop) if data.task.kind is Kind.GENERATION else [],
        "max_length": data.max_length,
        "prompt_length": data.prompt_length,
        "num_demonstrations": data.num_demonstrations,
        "data": prepared.fingerprint.to_dict(),
        "settings": dict(prepared.settings),
        "environment": numerics(model.parts.model.device, data.processes.world_size),
        "hub": loaded_from_hub(prepared, data),
    }


def agreed_settings(options: TrainingOptions, data: TaskData) -> dict[str, Any]:
    """Return the options of model and rows that a checkpoint holds and in which all processes agree, by name, as primitives."""
    return {
        **options.step_settings(options.layer, options.noise_seed),
        "model.parallel": options.parallel,
        "model.max_nonfinite": options.max_nonfinite,
        "model.trust_remote_code": options.trust_remote_code,
        **flat_settings("model.engine", asdict(options.engine)),
        **data.step_settings(),
    }


def continued_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a resumed run: ``own`` ones, but optimizer, scheduler and seed of the checkpoint, which continue.

    A rate that becomes automatic, or ceases to be, is the new one.
    """
    takes_rate = _takes_new_rate(saved, own)

    def continues(name: str) -> bool:
        if name == _RATE and takes_rate:
            return False
        return name.startswith(("model.optimizer", "model.lr_scheduler")) or name == "model.seed"

    kept = {name: value for name, value in own.items() if not continues(name)}
    return kept | {name: value for name, value in saved.items() if continues(name)}


def _takes_new_rate(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the rate of a resumed run is its own one: it becomes automatic, or ceases to be."""
    return own[_RATE] != saved[_RATE] and "auto" in (own[_RATE], saved[_RATE])


# options of optimizer and scheduler that say how the same step is computed, or that change during a training
_NOT_COMPARED = ("fused", "foreach", "last_epoch")


def changed_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> str:
    """Return the options of a resumed run that differ from those of its checkpoint, as text; see :func:`agreed_settings`.

    A layer that either of them leaves out is no change: it is that of the checkpoint, and another one is refused.
    """

    def compared(settings: Mapping[str, Any]) -> dict[str, Any]:
        last = {name: name.rpartition(".")[2] for name in settings}
        return {name: settings[name] for name in settings if last[name] not in _NOT_COMPARED and last[name][0] != "_"}

    old, new = compared(saved), compared(own)
    if None in (old["model.layer"], new["model.layer"]):
        del old["model.layer"], new["model.layer"]
    return differences(old, new)


def apply_changed_settings(checkpoint: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Warn of options that differ from a checkpoint's; a rate that ceases to be automatic replaces those of its optimizers.

    Args:
        checkpoint: Content of the checkpoint; rates are changed in place.
        own: Options of the run that continues it, see :func:`agreed_settings`.
    """
    saved = checkpoint["slzo"]["settings"]
    new_rate = _takes_new_rate(saved, own)
    if new_rate and own[_RATE] != "auto":
        for group in chain.from_iterable(each["param_groups"] for each in checkpoint["optimizer_states"]):
            group["lr"] = own[_RATE]
    if changes := changed_settings(saved, own):
        rate = f"; {_RATE} is the new one" if new_rate else ""
        rank_zero_warn(
            f"these options differ from the checkpoint's: {changes}; the new values are used, except those of model.seed, "
            f"model.optimizer and model.lr_scheduler, which continue from the checkpoint{rate}"
        )


# what the score of a row depends on besides the row, the model and the task's class
REWARDS = ("data.objective", "data.reward")
"""Groups of options with rewards."""
_OF_REWARDS = ("functions", "best")
_NAMES = ("_file", ".name")  # of tasks; the rows themselves are compared


def task_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the task, such as its prompt, without files and name; ``settings`` are those of a checkpoint."""
    return {
        name: value for name, value in settings.items() if name.startswith("data.task.") and not name.endswith(_NAMES)
    }


def scores_are_comparable(checkpoint: Mapping[str, Any], prepared: Prepared, data: TaskData, split: str) -> bool:
    """Return whether scores of ``dev`` or ``test`` rows in a checkpoint can be compared with those of the run that continues it.

    They cannot be compared if rows, task or rewards have changed, or if free answers are now scored for another objective.
    """

    def scoring(settings: Mapping[str, Any]) -> dict[str, Any]:
        names = {f"{name}.{argument}" for name in REWARDS for argument in _OF_REWARDS}
        names.update(REWARDS if data.task.kind is Kind.GENERATION else ())
        names.update(task_settings(settings))
        if "data.task.name" not in settings:  # otherwise data.task is this name
            names.add("data.task")
        return {name: settings[name] for name in names if name in settings}

    metadata = checkpoint["slzo"]
    before, now = metadata["data"]["rows"].get(split), prepared.fingerprint.rows[split]
    same_rows = before is not None and torch.equal(before, now)
    return same_rows and not differences(scoring(metadata["settings"]), scoring(prepared.settings))


def check_environment(metadata: Mapping[str, Any], device: torch.device, processes: int) -> None:
    """Warn of versions and hardware that differ from those of a checkpoint."""
    old, new = metadata["environment"], numerics(device, processes)
    if changes := differences(old, new):
        is_same = old["device"] == new["device"]
        effect = "results are equal up to rounding" if is_same else "random directions differ between devices"
        rank_zero_warn(f"the environment differs from the checkpoint's: {changes}; {effect}")


def logged_options(options: TrainingOptions, layer: int | None, seed: int) -> dict[str, Any]:
    """Return the options of the model that steps depend on, as they are read back from JSON.

    The base model is left out, because its fingerprint is compared.
    """
    own = options.step_settings(layer, seed)
    del own["model.model"]
    return dict(json.loads(json.dumps(own, default=str)))


def log_settings(prepared: Prepared, data: TaskData) -> dict[str, Any]:
    """Return the settings that steps depend on, as they are read back from JSON."""
    settings = data.step_settings()
    batch_size = settings.pop("data.batch_size")  # of one process; their number may change
    return {
        **logged_options(prepared.options, prepared.model.layer, prepared.stepper.seed),
        **settings,
        "rows per step": batch_size * data.processes.row_partition.total,
        "train rows": prepared.fingerprint.hashes()["train rows"],
        "device": device_name(prepared.model.parts.model.device),
    }


def open_step_log(
    prepared: Prepared, data: TaskData, run: RunContext
) -> tuple[StepLogWriter | None, dict[int, StepRecord]]:
    """Begin the log of losses in the run's folder, with the log of the continued run.

    A resumed run first repeats the steps that the log has after the checkpoint, without forward passes, unless an option that
    they depend on has changed. Estimators that perturb no weights have no log, and a second training by the same trainer keeps
    that of the first one: the steps of both could not be repeated together, because the optimizer begins anew.

    Returns:
        The writer of the log, ``None`` if no log is written; and the steps to repeat.
    """
    if run.quick or run.steps_before > 0 or prepared.options.estimator.perturbs != "weights":
        return None, {}
    settings = log_settings(prepared, data)
    first = data.processes.rank == 0
    before = data.processes.broadcast(_log_before(run, settings) if first else None)
    step = 0 if run.checkpoint is None else run.checkpoint.step
    known = {} if before is None else _steps_to_repeat(before, step)
    if known:
        rank_zero_print(f"Steps {step} to {max(known)} are in the log of the run and are repeated from it.")
    if run.folder is None or not first:
        return None, known
    if run.checkpoint is None:
        write_checkpoint(_start(prepared, data), run.folder / START)
    elif (start := run.checkpoint.run_folder / START).is_file():
        copy_file(start, run.folder / START)
    return StepLogWriter(run.folder / STEP_LOG, StepLog(settings, () if before is None else before.before(step))), known


def _steps_to_repeat(log: StepLog, step: int) -> dict[int, StepRecord]:
    """Return the steps from ``step`` on, up to the next rollback: whether it comes again depends on options of validations."""
    end = min((steps for steps in log.rollbacks if steps > step), default=math.inf)
    return {number: record for number, record in log.steps.items() if step <= number < end}


def _log_before(run: RunContext, settings: Mapping[str, Any]) -> StepLog | None:
    """Return the log of the continued run; ``None`` if there is none, or if its options differ."""
    path = None if run.checkpoint is None else run.checkpoint.run_folder / STEP_LOG
    if path is None or not path.is_file():
        return None
    try:
        log = read_step_log(path)
    except SlzoError as error:
        rank_zero_warn(f"{error}; its steps are not used")
        return None
    if changes := differences(log.settings, settings):
        rank_zero_warn(
            f"options that steps depend on have changed ({changes}); the log of the run is not used: steps after the checkpoint "
            "are taken again, and slzo replay can rebuild the run that it continues, but not this one"
        )
        return None
    return log


def _start(prepared: Prepared, data: TaskData) -> dict[str, Any]:
    """Return a checkpoint of the first masters, which are left out if they follow from the base model."""
    tensors = prepared.model.tensors
    is_needed = prepared.tuned_before or prepared.model.adapter is not None
    return {
        "global_step": 0,
        "pytorch-lightning_version": version("lightning"),
        "state_dict": tensors.clone_masters() if is_needed else {},
        "slzo": make_metadata(prepared, data),
    }
