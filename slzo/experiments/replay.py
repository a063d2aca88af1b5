"""The tuned weights of a run at any step, from the losses that its log holds."""

from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from slzo.checkpoint import read_checkpoint, write_checkpoint
from slzo.console import say
from slzo.errors import SlzoError
from slzo.files import check_writable
from slzo.module import ZOModule
from slzo.step_log import NAME, START, StepLog, read_step_log
from slzo.zo.go_back import go_back
from slzo.zo.recorder import StepRecorder
from slzo.zo.step_size import StepSize
from slzo.zo.tuned_model import TunedModel


def replay_run(module: ZOModule, run: Path, steps: int | None, max_steps: int, output: Path | None = None) -> Path:
    """Take a run's first steps again with the losses of its log, and write a checkpoint; returns its path.

    On the same machine and number of threads the weights are those of the run, bit by bit.

    Args:
        module: With the options of the run; its model is loaded here.
        run: Folder of the run.
        steps: How many; ``None`` for all of the log.
        max_steps: Of the run; schedules depend on it.
        output: Checkpoint to write; ``None`` for one in the run's folder.

    Raises:
        SlzoError: The run has no whole log of so many steps, or it is of other options.
    """
    if not run.is_dir() or str(run) == ".":
        raise SlzoError(
            f"run {'' if str(run) == '.' else str(run)!r}: no such folder; give that of a run, as runs/version_0"
        )
    if module.estimator.differentiates:
        raise SlzoError(
            f"model.estimator {module.estimator.describe()}: differentiates, and has no replay; use a checkpoint"
        )
    log = read_step_log(run / NAME)
    number = _number_of_steps(log, steps, run)
    output = run / "checkpoints" / f"replay-step={number}.ckpt" if output is None else output
    check_writable(output)
    start = read_checkpoint(run / START)
    if start.note.get("turn") is not None:
        raise SlzoError(
            f"model.scope {module.scope.describe()}: the model measures each layer's step, and a replay runs no model; use a "
            "checkpoint"
        )
    content = {**start.content, "global_step": number}
    content["slzo"], content["state_dict"] = _take_steps(
        module, start.note, start.content["state_dict"], log, number, max_steps
    )
    write_checkpoint(content, output)
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


def _take_steps(
    module: ZOModule, note: dict[str, Any], first: dict[str, Tensor], log: StepLog, steps: int, max_steps: int
) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The note and the masters after some steps."""
    module.configure_model()
    subset = module.scope.subset(tuple(note["tensors"]), module.parts)
    tuned_model = TunedModel.of_description(module.parts, note, module.engine, subset)
    tensors, choice = tuned_model.tensors, module.optimizer_choice
    if first:
        tensors.load(first)
    optimizer = choice.make(tensors.masters)
    scheduler = None if choice.make_scheduler is None else choice.make_scheduler(optimizer)
    step_size = None if note["step_size"] is None else StepSize(**note["step_size"])
    options = module.step_options
    if options.eps is None and step_size is not None:
        options = replace(options, eps=step_size.eps)
    recorder = StepRecorder(module.device, log.steps)
    good = {to: tensors.copy_of_masters() for to in log.went_back.values() if to == 0}
    for step in range(steps):
        tuned_model.step(
            recorder.loss(step, _unknown),
            module.estimator,
            optimizer,
            options,
            seed=note["noise_seed"],
            step=step,
            max_steps=max_steps,
            step_size=step_size if choice.automatic else None,
        )
        recorder.done(step, float(optimizer.param_groups[0]["lr"]), options.eps_at(step, max_steps))
        if scheduler is not None:
            scheduler.step()
        if step + 1 in log.went_back.values():
            good[step + 1] = tensors.copy_of_masters()
        to = log.went_back.get(step + 1)
        if to is not None:
            schedulers = [] if scheduler is None else [scheduler]
            go_back(tensors, good.get(to), optimizer, schedulers, step_size if choice.automatic else None)
    note = {**note, "step_size": None if step_size is None else step_size.to_dict()}
    return note, {name: master.detach().clone() for name, master in tensors.named_masters().items()}


def _unknown() -> Any:
    raise AssertionError("every step up to the last is in the log")
