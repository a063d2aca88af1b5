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
from slzo.training.profiling import ChosenLayer, ProfileOptions
from slzo.training.time_plan import TimeBudget, TimePlan
from slzo.zo.stepper import Stepper
from slzo.zo.tuned_model import TunedModel


@dataclass(frozen=True)
class RunContext:
    """Where and how long a training runs.

    Attributes:
        device: Device of this process.
        max_steps: Number of steps at which it ends; -1 for no limit.
        planned_steps: Number of steps that it is expected to take.
        folder: Folder for the log of losses; ``None`` if no checkpoints are written.
        checkpoint: Checkpoint to continue; ``None`` for a new training.
        profiler: How the model is profiled; ``None`` if no layer is chosen by a profile.
        steps_before: Steps of earlier trainings by the same trainer, which are not in the log of losses.
        quick: Whether it is a ``fast_dev_run``, in which nothing extra is measured or written.
        time_budget: Time of the run; ``None`` if it is not limited.
        shard_group: Processes that share the frozen layers; ``None`` if this one has all.
    """

    device: torch.device
    max_steps: int
    planned_steps: int
    folder: Path | None
    checkpoint: Checkpoint | None
    profiler: ProfileOptions | None
    steps_before: int
    quick: bool
    time_budget: TimeBudget | None
    shard_group: ShardGroup | None


@dataclass(frozen=True)
class Prepared:
    """Everything that the steps of a training need.

    Attributes:
        options: Options of the training, with the decisions made in preparation.
        settings: Options of model and rows as given; of a continued run some are those of the checkpoint, see
            :func:`slzo.training.resume.continued_settings`.
        untuned: The untuned model.
        model: The model with its tuned tensors.
        stepper: Takes the steps.
        fingerprint: Fingerprint of the rows.
        chosen: The tuned layer, why it was chosen, and its profile.
        memory_plan: Estimate of the memory; ``None`` if none was made.
        resumed: Whether a checkpoint is continued.
        time_plan: Planned steps and validations; ``None`` if the time is not limited.
        tuned_before: Whether the training started from tuned weights, not from those of the base model.
    """

    options: TrainingOptions
    settings: Mapping[str, Any]
    untuned: ModelParts
    model: TunedModel
    stepper: Stepper
    fingerprint: DataFingerprint
    chosen: ChosenLayer
    memory_plan: MemoryPlan | None
    resumed: bool
    time_plan: TimePlan | None
    tuned_before: bool
