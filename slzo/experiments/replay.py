"""Rebuilds the tuned weights of a run at any step, from the losses that its log holds."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from slzo.checkpoints.checkpoint import read_checkpoint, write_checkpoint
from slzo.checkpoints.step_log import NAME, START, StepLog, read_step_log
from slzo.models.parts import ModelParts
from slzo.task_rows import TaskRows
from slzo.training import load_parts
from slzo.utils.console import say
from slzo.utils.errors import SlzoError
from slzo.utils.files import check_writable
from slzo.zo.auto_step import AutoStep
from slzo.zo.options import TrainingOptions
from slzo.zo.stepper import Stepper
from slzo.zo.tuned_model import TunedModel


def replay_run(
    options: TrainingOptions,
    rows: TaskRows,
    run: Path,
    steps: int | None,
    max_steps: int,
    output: Path | None = None,
    device: torch.device | None = None,
) -> Path:
    """Take the first steps of a run again with the losses of its log, and write a checkpoint; returns its path.

    On the same machine and number of threads the weights are those of the run, bit by bit.

    Args:
        options: Those of the run.
        rows: Those of the run; only their objective is used, and none is read.
        run: Folder of the run.
        steps: How many; ``None`` for all of the log.
        max_steps: Of the run; schedules depend on it.
        output: Checkpoint to write; ``None`` for one in the run's folder.
        device: Where the steps are taken; ``None`` for the CPU.

    Raises:
        SlzoError: The run has no whole log of so many steps, or it is of other options.
    """
    if not run.is_dir() or str(run) == ".":
        raise SlzoError(
            f"run {'' if str(run) == '.' else str(run)!r}: no such folder; give that of a run, as runs/version_0"
        )
    if options.estimator.differentiates:
        raise SlzoError(
            f"model.estimator {options.estimator.describe()}: it differentiates, so there is no log of losses; use a checkpoint"
        )
    log = read_step_log(run / NAME)
    number = _number_of_steps(log, steps, run)
    output = run / "checkpoints" / f"replay-step={number}.ckpt" if output is None else output
    check_writable(output)
    start = read_checkpoint(run / START)
    parts = load_parts(options, torch.device("cpu") if device is None else device)
    stepper = _stepper(parts, options, rows, start.note, log, max_steps)
    if first := start.content["state_dict"]:
        stepper.model.tensors.load(first)
    state = _take_steps(stepper, options, log, number)
    note = {**start.note, **stepper.state_dict()}
    write_checkpoint({**start.content, "global_step": number, "slzo": note, "state_dict": state}, output)
    say(f"Checkpoint {output}, the tuned weights after {number} steps")
    return output


def _number_of_steps(log: StepLog, asked: int | None, run: Path) -> int:
    known = log.steps
    whole = next((step for step in range(len(known) + 1) if step not in known), 0)
    if known and not whole:
        raise SlzoError(
            f"run {str(run)!r}: its log begins at step {min(known)}, that of the run it continues is not whole"
        )
    if asked is not None and not 0 <= asked <= whole:
        raise SlzoError(f"step {asked}: the log of {str(run)!r} has {whole} steps; give 0 to {whole}")
    return whole if asked is None else asked


def _stepper(
    parts: ModelParts, options: TrainingOptions, rows: TaskRows, note: dict[str, Any], log: StepLog, max_steps: int
) -> Stepper:
    subset = options.scope.subset(tuple(note["tensors"]), parts)
    model = TunedModel.of_description(parts, note, options.engine, subset)
    auto = None if note["auto_step"] is None else AutoStep(**note["auto_step"])
    return Stepper(
        model,
        rows.objective,
        options.estimator,
        options.step,
        seed=note["noise_seed"],
        max_steps=max_steps,
        auto=auto,
        sets_rate=options.optimizer.automatic,
        max_nonfinite=options.max_nonfinite,
        known=log.steps,
    )


def _take_steps(stepper: Stepper, options: TrainingOptions, log: StepLog, steps: int) -> dict[str, Tensor]:
    """The masters after some steps."""
    tensors, choice = stepper.model.tensors, options.optimizer
    optimizer = choice.make(tensors.masters)
    scheduler = None if choice.make_scheduler is None else choice.make_scheduler(optimizer)
    good = {to: tensors.copy_of_masters() for to in log.rollbacks.values() if to == 0}
    for step in range(steps):
        stepper.step(None, step, optimizer, scheduler)
        if step + 1 in log.rollbacks.values():
            good[step + 1] = tensors.copy_of_masters()
        to = log.rollbacks.get(step + 1)
        if to is not None:
            stepper.rollback(good.get(to), optimizer, [] if scheduler is None else [scheduler], step + 1, to)
    return tensors.copy_of_masters()
