"""Rebuild the tuned weights of a run at any step from the losses in its log."""

import shlex

import torch

from slzo.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from slzo.checkpoints.find import REPLAYED
from slzo.checkpoints.step_log import NAME, START, StepLog, read_step_log
from slzo.task_data import TaskData
from slzo.training.build import load_parts, restore, restored_rate
from slzo.training.loss_log import logged_options
from slzo.training.options import TrainingOptions
from slzo.utils.console import rank_zero_print
from slzo.utils.environment import device_name
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded, output_file
from slzo.utils.pluralize import pluralize
from slzo.utils.run_layout import CHECKPOINTS_FOLDER, CONFIG_FILE, ENVIRONMENT_FILE
from slzo.utils.settings import differences
from slzo.zo.stepper import Stepper


def replay_run(
    options: TrainingOptions, data: TaskData, run: str, steps: int | None, output: str | None, device: torch.device
) -> None:
    """Take the first steps of a run again with the losses of its log, and write a checkpoint.

    On the same machine with the same number of threads the weights are bit-identical to those of the run. No row is read. For
    ``steps`` and ``output`` see :func:`slzo.commands.replay.replay`.

    Raises:
        SlzoError: The folder has no complete log of that many steps, or the estimator needs no losses.
    """
    folder = expanded(run)
    if not run or not folder.is_dir():
        raise SlzoError(f"run {run!r}: no such folder; give the folder of a run, runs/version_N")
    # a run from Python has no config
    if not any((folder / name).exists() for name in (CONFIG_FILE, ENVIRONMENT_FILE, NAME)):
        raise SlzoError(f"run {run!r}: not the folder of a run; give one such as runs/version_0")
    options.check_objective(data.objective)
    if options.estimator.perturbs != "weights" and not (folder / NAME).exists():
        raise SlzoError(
            f"model.estimator {options.estimator.describe()}: uses a derivative, so there is no log of losses; use a checkpoint"
        )
    log = read_step_log(folder / NAME)
    number = _number_of_steps(log, steps, run)
    if (trained_on := log.settings["device"]) != device_name(device):
        raise SlzoError(
            f"trainer.accelerator: run {run!r} was trained on {trained_on}, and random directions differ on "
            f"{device_name(device)}; replay it on {trained_on}"
        )
    name = f"{REPLAYED}step={number}.ckpt"
    path = output_file(folder / CHECKPOINTS_FOLDER / name if output is None else output, name)
    if path.is_file() and not path.name.startswith(REPLAYED):
        raise SlzoError(f"output {output!r}: exists, and a replayed checkpoint cannot be continued; give another path")
    start = read_checkpoint(folder / START)
    is_named = options.layer is not None and options.scope.needs_layer
    layer = options.layer if is_named else start.metadata["layer"]
    logged = {name: value for name, value in log.settings.items() if name.startswith("model.")}
    if changes := differences(logged, logged_options(options, layer, start.metadata["noise_seed"])):
        raise SlzoError(f"run {run!r}: these options and the run's log differ ({changes}); give those of the log")
    parts = load_parts(options, device)
    stepper = Stepper(
        restore(parts, start, options, for_training=True),
        data.objective,
        options.estimator,
        options.step,
        seed=start.metadata["noise_seed"],
        auto=restored_rate(start.metadata["auto_step"], options),
        sets_rate=options.optimizer.automatic,
        max_nonfinite=None,  # also for a run that diverged
    )
    _take_steps(stepper, options, log, number)
    metadata, masters = {**start.metadata, **stepper.state_dict()}, stepper.model.tensors.clone_masters()
    write_checkpoint({**start.content, "global_step": number, "slzo": metadata, "state_dict": masters}, path)
    rank_zero_print(f"Checkpoint {path}, the tuned weights after {pluralize(number, 'step')}")
    config = folder / CONFIG_FILE
    if config.is_file() and path.resolve().parent != (folder / CHECKPOINTS_FOLDER).resolve():
        rank_zero_print(
            f"It is outside of the run's folder: for test and predict, give {shlex.join(['--config', str(config)])} too"
        )


def _number_of_steps(log: StepLog, requested: int | None, run: str) -> int:
    known = log.steps
    available = next(step for step in range(len(known) + 1) if step not in known)
    if known and not available:
        raise SlzoError(
            f"run {run!r}: its log begins at step {min(known)}, because options changed when it was resumed, or the log of the "
            "run that it continues is incomplete; replay that one"
        )
    if requested is not None and not 0 <= requested <= available:
        raise SlzoError(
            f"step {requested}: the log of {run!r} has {pluralize(available, 'step')}; give 0 to {available}"
        )
    return available if requested is None else requested


def _take_steps(stepper: Stepper, options: TrainingOptions, log: StepLog, number: int) -> None:
    """Take the first steps of a log, and go back where it says so."""
    stepper.use_log(None, log.steps)
    optimizer, scheduler = options.optimizer.build(stepper.model.tensors.masters)
    rollbacks, targets = log.rollbacks, {}
    for steps in range(number + 1):
        if steps > 0:
            stepper.step(None, steps - 1, optimizer, scheduler)
        if steps in rollbacks.values():
            targets[steps] = stepper.snapshot(steps)
        if (to := rollbacks.get(steps)) is not None:
            schedulers = [] if scheduler is None else [scheduler]
            stepper.rollback(targets.get(to), steps, optimizer, schedulers, options.optimizer.make)
