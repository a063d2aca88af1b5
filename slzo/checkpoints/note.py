"""The note of a checkpoint says what its tensors are and to which model they belong."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.utils.hub import model_commit, split_revision

CHECKPOINT_FORMAT = 2

_MISSING = object()
_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "scope": (dict,),
        "adapter": (dict, type(None)),
        "tensors": (dict,),
        "layer": (int, type(None)),
        "num_evaluations": (float, int),
        "model": (str,),
        "layer_reason": (str,),
        "dtype": (str,),
        "trust_remote_code": (bool,),
        "noise_seed": (int,),
        "num_nonfinite": (int,),
        "auto_step": (dict, type(None)),
        "nonfinite_in_row": (int,),
        "base": (dict,),
        "data": (dict,),
        "settings": (dict,),
        "environment": (dict,),
        "hub": (dict,),
        "onednn": (bool, type(None)),
    }
)


def checkpoint_note(content: Any, option: str = "ckpt_path") -> dict[str, Any]:
    """Return the note of a checkpoint, which says what its tensors are and to which model they belong.

    Raises:
        SlzoError: It was not written by slzo, was written in another format, or is damaged.
    """
    note: Any = content.get("slzo") if isinstance(content, dict) else None
    if not isinstance(note, dict) or "format" not in note:
        raise SlzoError(f"{option}: not a checkpoint written by slzo; give one from a run's checkpoints folder")
    if note["format"] != CHECKPOINT_FORMAT:
        raise SlzoError(
            f"{option}: has format {note['format']!r}, and this slzo reads {CHECKPOINT_FORMAT}; use the version that wrote it"
        )
    for name, types in _FIELDS.items():
        value = note.get(name, _MISSING)
        is_bool = isinstance(value, bool) and bool not in types
        if is_bool or not isinstance(value, types):
            found = "is missing" if value is _MISSING else f"is a {type(value).__name__}"
            raise SlzoError(f"{option}: its note is damaged: {name} {found}; give an unchanged checkpoint of slzo")
    for name, entry in note["tensors"].items():
        if not _is_description(entry):
            raise SlzoError(
                f"{option}: its note is damaged: tensor {name!r} has no usable description; give an unchanged checkpoint of slzo"
            )
    if not _is_data(note["data"]):
        raise SlzoError(f"{option}: its note is damaged: data is incomplete; give an unchanged checkpoint of slzo")
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


def _is_data(entry: Mapping[str, Any]) -> bool:
    """Whether the entries of :class:`slzo.data.fingerprint.DataFingerprint` have the right types."""
    rows = entry.get("rows")
    is_hashes = isinstance(rows, dict) and all(isinstance(h, Tensor) and h.dim() == 1 for h in rows.values())
    return isinstance(entry.get("tokenizer"), str) and is_hashes


def _is_description(entry: Any) -> bool:
    """Whether kind, shape and constants of a tuned tensor have the right types; see TunedTensors.description."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return False
    shape = entry.get("shape")
    sizes = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    constants = [value for name, value in entry.items() if name not in ("kind", "shape")]
    return sizes and all(isinstance(value, Tensor) for value in constants)
