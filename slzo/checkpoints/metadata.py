"""The metadata of a checkpoint: what its tensors are and to which model they belong."""

from collections.abc import Mapping
from typing import Any

from slzo.utils.errors import SlzoError
from slzo.utils.hub import model_commit, split_revision

CHECKPOINT_FORMAT = 3
"""Format of checkpoints; to be raised when the metadata, or what a callback saves, changes. New keys may be optional instead."""

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


def checkpoint_metadata(content: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the metadata of a checkpoint: what its tensors are and to which model they belong.

    Raises:
        SlzoError: It was not written by slzo, was written in another format, or lacks a field.
    """
    metadata: Any = content.get("slzo") if isinstance(content, dict) else None
    if not isinstance(metadata, dict) or "format" not in metadata:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    if metadata["format"] != CHECKPOINT_FORMAT:
        raise SlzoError(
            f"{option}: has format {metadata['format']!r}, and this slzo reads {CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    if missing := [name for name in _FIELDS if name not in metadata]:
        raise SlzoError(f"{option}: its metadata lacks {', '.join(missing)}; give an unchanged checkpoint of slzo")
    return metadata


def base_model(metadata: Mapping[str, Any]) -> str:
    """Return the name that loads the base model of a checkpoint, of the commit that was tuned if it is from the Hub."""
    commit = metadata["hub"].get("model_commit")
    return str(metadata["model"]) if commit is None else f"{split_revision(metadata['model'])[0]}@{commit}"


def check_commit(metadata: Mapping[str, Any], model: str, folder: str | None) -> None:
    """Check that a model of the Hub, loaded from a folder, is at the commit that a checkpoint was trained on.

    Raises:
        SlzoError: It is at another commit.
    """
    own, saved = model_commit(model, folder), metadata["hub"].get("model_commit")
    if None not in (own, saved) and own != saved:
        raise SlzoError(
            f"model.model {model!r}: is at commit {own}, and the checkpoint was trained on another one; give --model.model "
            f"{split_revision(model)[0]}@{saved}"
        )
