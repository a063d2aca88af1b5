"""The note of a checkpoint says what its tensors are and to which model they belong."""

from collections.abc import Mapping
from typing import Any

from slzo.utils.errors import SlzoError
from slzo.utils.hub import model_commit, split_revision

CHECKPOINT_FORMAT = 3
"""Format of checkpoints; to be raised when the note, or what a callback saves, changes."""

_FIELDS = (
    "scope",
    "adapter",
    "tensors",
    "layer",
    "num_evaluations",
    "model",
    "layer_reason",
    "dtype",
    "trust_remote_code",
    "noise_seed",
    "num_nonfinite",
    "auto_step",
    "nonfinite_in_row",
    "base",
    "data",
    "settings",
    "environment",
    "hub",
    "onednn",
)


def checkpoint_note(content: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the note of a checkpoint, which says what its tensors are and to which model they belong.

    Raises:
        SlzoError: It was not written by slzo, was written in another format, or lacks a field.
    """
    note: Any = content.get("slzo") if isinstance(content, dict) else None
    if not isinstance(note, dict) or "format" not in note:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    if note["format"] != CHECKPOINT_FORMAT:
        raise SlzoError(
            f"{option}: has format {note['format']!r}, and this slzo reads {CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    if missing := [name for name in _FIELDS if name not in note]:
        raise SlzoError(f"{option}: its note has no {', '.join(missing)}; give an unchanged checkpoint of slzo")
    return note


def base_model(note: Mapping[str, Any]) -> str:
    """Return the name that loads the base model of a checkpoint, of the commit that was tuned if it is from the Hub."""
    commit = note["hub"].get("model_commit")
    return str(note["model"]) if commit is None else f"{split_revision(note['model'])[0]}@{commit}"


def check_commit(note: Mapping[str, Any], model: str, folder: str | None) -> None:
    """Check that a model of the Hub is at the commit that a checkpoint was trained on.

    Args:
        note: Note of the checkpoint.
        model: Name of the model, as in ``model.model``.
        folder: Folder that it is loaded from.

    Raises:
        SlzoError: It is at another commit.
    """
    own, saved = model_commit(model, folder), note["hub"].get("model_commit")
    if None not in (own, saved) and own != saved:
        raise SlzoError(
            f"model.model {model!r}: is at commit {own}, and the checkpoint was trained on another one; give --model.model "
            f"{split_revision(model)[0]}@{saved}"
        )
