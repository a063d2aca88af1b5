"""The context of a run, as its trainer has it."""

from pathlib import Path

from lightning.pytorch import Trainer

from slzo.callbacks.time_limit import TimeLimit
from slzo.checkpoints.checkpoint import Checkpoint
from slzo.lightning.strategy import shard_group_of
from slzo.lightning.trainer_state import callback_of, is_quick, planned_steps
from slzo.task_data import TaskData
from slzo.training.profiling import ProfileOptions
from slzo.training.run import RunContext


def run_context(
    trainer: Trainer, data: TaskData, folder: Path | None = None, checkpoint: Checkpoint | None = None
) -> RunContext:
    """Return where and how long a trainer trains, with rows that are set up for ``fit``."""
    options = (getattr(each, "options", None) for each in trainer.callbacks)  # type: ignore[attr-defined]
    limit = callback_of(trainer, TimeLimit)
    done = None if checkpoint is None else checkpoint.step
    return RunContext(
        device=trainer.strategy.root_device,
        max_steps=trainer.max_steps,
        planned_steps=planned_steps(trainer, data),
        folder=folder,
        checkpoint=checkpoint,
        profiler=next((each for each in options if isinstance(each, ProfileOptions)), None),
        steps_before=trainer.global_step if done is None else 0,
        quick=is_quick(trainer),
        time_budget=None if limit is None or is_quick(trainer) else limit.budget(trainer, data, done),
        shard_group=shard_group_of(trainer),
    )
