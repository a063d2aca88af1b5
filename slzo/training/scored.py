"""Whether scores with the present rows and options can be compared with those of a checkpoint's run."""

from collections.abc import Mapping
from typing import Any

import torch

from slzo.data.fingerprint import are_drawn_alike, are_trained_rows, check_tokenizer, hash_tokenizer
from slzo.task_data import TaskData
from slzo.tasks.base import Kind
from slzo.training.options import TrainingOptions
from slzo.training.run import Prepared
from slzo.utils.console import rank_zero_warn
from slzo.utils.settings import differences

# what the score of a row depends on besides the row, the model and the task's class
_REWARDS = ("data.objective", "data.reward")
_REWARD_ARGUMENTS = ("functions", "best")
_NAMES = ("_file", ".name")  # of tasks; the rows themselves are compared


def _task_settings(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the options of the task, such as its prompt, without files and name; ``settings`` are those of a checkpoint."""
    return {
        name: value for name, value in settings.items() if name.startswith("data.task.") and not name.endswith(_NAMES)
    }


def scores_are_comparable(checkpoint: Mapping[str, Any], prepared: Prepared, data: TaskData, split: str) -> bool:
    """Return whether scores of ``dev`` or ``test`` rows in a checkpoint can be compared with those of the run that continues it.

    They cannot be compared if rows, task or rewards have changed, or if free answers are now scored for another objective.
    """

    def scoring(settings: Mapping[str, Any]) -> dict[str, Any]:
        names = {f"{name}.{argument}" for name in _REWARDS for argument in _REWARD_ARGUMENTS}
        names.update(_REWARDS if data.task.kind is Kind.GENERATION else ())
        names.update(_task_settings(settings))
        if "data.task.name" not in settings:  # otherwise data.task is this name
            names.add("data.task")
        return {name: settings[name] for name in names if name in settings}

    metadata = checkpoint["slzo"]
    before, now = metadata["data"]["rows"].get(split), prepared.fingerprint.rows[split]
    same_rows = before is not None and torch.equal(before, now)
    return same_rows and not differences(scoring(metadata["settings"]), scoring(prepared.settings))


def check_scored(options: TrainingOptions, data: TaskData, metadata: Mapping[str, Any], stage: str | None) -> None:
    """Check that the rows have the tokenizer of a checkpoint that is scored.

    Warn of other types, of other options of the same task, and of rows that it may have been trained on.

    The ``stage`` is what the trainer runs, such as validate or test.

    Raises:
        SlzoError: The checkpoint was trained with another tokenizer.
    """
    same_task = data.task.name == metadata["settings"]["data.task"]
    types = ("dtype", "quantization")
    saved = {f"model.{name}": metadata[name] for name in types}
    own = {f"model.{name}": getattr(options, name) for name in types}
    if same_task:
        saved |= _task_settings(metadata["settings"])
        own |= _task_settings(data.step_settings())
    if changes := differences(saved, own):
        rank_zero_warn(
            f"these options differ from the checkpoint's: {changes}; scores may differ from those of its run"
        )
    if data.allow_changed_rows:
        return
    check_tokenizer(hash_tokenizer(data.encoder.tokenizer), metadata["data"])
    if not same_task:
        return
    if stage == "validate" and not are_trained_rows(data.rows("train"), metadata["data"]):
        rank_zero_warn(
            "with these data options the training rows are not those of the checkpoint's run, so dev rows may be among the "
            "rows that it was trained on; use its options, or slzo test"
        )
    if stage == "test" and _draws_other_rows(data, metadata):
        rank_zero_warn(
            f"{data.task.files['train']} has changed since the checkpoint's run, and held-out rows are drawn from it, so "
            "some may be among the rows that it was trained on; restore the file, or give data.task.test_file"
        )


def _draws_other_rows(data: TaskData, metadata: Mapping[str, Any]) -> bool:
    """Return whether held-out rows are drawn from a training file that has changed since a checkpoint's run.

    ``False`` if it cannot be known, because other options encode the rows in another way.
    """
    assert data.splits is not None
    before, now = (
        _task_settings(settings) | {name: value for name, value in settings.items() if name.startswith(_REWARDS)}
        for settings in (metadata["settings"], data.step_settings())
    )
    lengths = (metadata["num_demonstrations"], metadata["prompt_length"])
    is_known = lengths == (data.num_demonstrations, data.prompt_length) and not differences(before, now)
    return bool(data.splits.origin) and is_known and not are_drawn_alike(data.rows("test"), metadata["data"])
