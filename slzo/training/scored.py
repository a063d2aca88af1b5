"""Whether the rows and options with which a checkpoint is scored are those that it was trained with."""

from collections.abc import Mapping
from typing import Any

from slzo.data.fingerprint import are_drawn_alike, are_trained_rows, check_tokenizer, hash_tokenizer
from slzo.task_data import TaskData
from slzo.training.options import TrainingOptions
from slzo.training.resume import REWARDS, task_settings
from slzo.utils.console import rank_zero_warn
from slzo.utils.settings import differences


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
        saved |= task_settings(metadata["settings"])
        own |= task_settings(data.step_settings())
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
        task_settings(settings) | {name: value for name, value in settings.items() if name.startswith(REWARDS)}
        for settings in (metadata["settings"], data.step_settings())
    )
    lengths = (metadata["num_demonstrations"], metadata["prompt_length"])
    is_known = lengths == (data.num_demonstrations, data.prompt_length) and not differences(before, now)
    return bool(data.splits.origin) and is_known and not are_drawn_alike(data.rows("test"), metadata["data"])
