"""The parts of a training run: where it runs, and what its steps need."""

from dataclasses import dataclass
from pathlib import Path

import torch

from slzo.checkpoints.checkpoint import Checkpoint
from slzo.data.fingerprint import DataFingerprint
from slzo.models.parts import ModelParts
from slzo.models.shard_group import ShardGroup
from slzo.profiling import ProfileOptions
from slzo.zo.memory import MemoryPlan
from slzo.zo.options import TrainingOptions
from slzo.zo.profile import OutlierProfile
from slzo.zo.selection import Choice
from slzo.zo.stepper import Stepper
from slzo.zo.time_plan import TimeBudget, TimePlan
from slzo.zo.tuned_model import TunedModel


@dataclass(frozen=True)
class RunContext:
    """Where and how long a training runs.

    Attributes:
        device: Device of this process.
        max_steps: Limit of the steps, -1 for none.
        planned_steps: Expected number of steps.
        folder: Folder of the run, for the log of losses; ``None`` if no checkpoints are written.
        checkpoint: Checkpoint to continue; ``None`` for a new training.
        profiler: How the model is profiled; ``None`` without a profiler.
        steps_before: Steps of earlier trainings by the same trainer, which are not in the log of losses.
        quick: Whether this is a ``fast_dev_run``, in which nothing extra is measured or written.
        time: The time of the run; ``None`` if it is not limited.
        shard_group: The processes that share the frozen layers; ``None`` if this process has all.
    """

    device: torch.device
    max_steps: int
    planned_steps: int
    folder: Path | None
    checkpoint: Checkpoint | None
    profiler: ProfileOptions | None
    steps_before: int
    quick: bool
    time: TimeBudget | None
    shard_group: ShardGroup | None


@dataclass
class Prepared:
    """Everything that the steps of a training need.

    Attributes:
        options: The options, with the decisions made in preparation.
        untuned: The untuned model.
        model: The tuned model.
        stepper: Takes the steps.
        layer_reason: Why the layer of the model was chosen.
        data: Fingerprint of rows and tokenizer, for checkpoints.
        choice: The choice of a rule, with its trials; ``None`` if no rule was used.
        profile: Outlier profile; ``None`` if there is none.
        plan: Memory plan; ``None`` if there is none.
        resumed: Whether a checkpoint is continued.
        time: Steps and validations for the time of the run; ``None`` if it is not limited.
    """

    options: TrainingOptions
    untuned: ModelParts
    model: TunedModel
    stepper: Stepper
    layer_reason: str
    data: DataFingerprint
    choice: Choice | None = None
    profile: OutlierProfile | None = None
    plan: MemoryPlan | None = None
    resumed: bool = False
    time: TimePlan | None = None
