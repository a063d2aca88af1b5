"""Load a model and fit rows to it, as a training does, and let rules choose layers."""

import torch

from slzo.models.parts import ModelParts
from slzo.profiling import ProfileOptions, choose, profile_model
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, load_parts
from slzo.zo.options import TrainingOptions
from slzo.zo.selection import SelectionRule


def load(options: TrainingOptions, rows: TaskRows, device: torch.device | None = None) -> ModelParts:
    """Load a model, by default on the GPU if there is one, and set up the rows of its training."""
    rows.setup("fit")
    parts = load_parts(options, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    adapt_rows(rows, parts, options)
    return parts


def chosen_layers(parts: ModelParts, rows: TaskRows, *rules: SelectionRule) -> list[int]:
    """Profile the layers, and return the choice of each rule; rules with trials cannot be used."""
    profile = profile_model(parts, rows, ProfileOptions(rules[0], 16, None))
    return [choose(profile, rule, "this tool runs no trials", rows).layer for rule in rules]
