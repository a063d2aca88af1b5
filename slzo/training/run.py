"""The parts of a training run: where it runs, and what its steps need."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.data.fingerprint import DataFingerprint
from slzo.models.parts import ModelParts
from slzo.models.shard_group import ShardGroup
from slzo.training.memory_estimate import MemoryPlan
from slzo.training.options import TrainingOptions
from slzo.training.profiling import ProfileOptions
from slzo.training.time_plan import TimeBudget, TimePlan
from slzo.zo.profile import OutlierProfile
from slzo.zo.selection import Choice
from slzo.zo.stepper import Stepper
from slzo.zo.tuned_model import TunedModel


@dataclass(frozen=True)
class RunContext:
    """Where and how long a training runs."""

    device: torch.device  # of this process
    max_steps: int  # -1 for no limit
    planned_steps: int
    folder: Path | None  # for the log of losses; None if no checkpoints are written
    checkpoint: Checkpoint | None  # to continue; None for a new training
    profiler: ProfileOptions | None
    steps_before: int  # of earlier trainings by the same trainer, which are not in the log of losses
    quick: bool  # a fast_dev_run, in which nothing extra is measured or written
    time: TimeBudget | None  # None if it is not limited
    shard_group: ShardGroup | None  # processes that share the frozen layers; None if this one has all


@dataclass
class Prepared:
    """Everything that the steps of a training need."""

    options: TrainingOptions  # with the decisions made in preparation
    settings: Mapping[str, Any]  # the options as given, of model and rows
    untuned: ModelParts
    model: TunedModel
    stepper: Stepper
    data: DataFingerprint
    choice: Choice | None  # the layer and why it was chosen; None for a scope without a layer
    profile: OutlierProfile | None
    plan: MemoryPlan | None
    resumed: bool  # whether a checkpoint is continued
    time: TimePlan | None  # None if the time is not limited
    tuned_before: bool  # whether the first masters are not those of the base model

    @property
    def layer_reason(self) -> str:
        """Why the layer was chosen; empty for a scope without a layer."""
        return "" if self.choice is None else self.choice.reason
