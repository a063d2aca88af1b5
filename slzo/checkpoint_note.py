"""What the note in a checkpoint must hold, and whether it does."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import Tensor

from slzo.errors import SlzoError

FORMATS = (2, 3, 4)
"""Formats that are read; the last one is written. Format 3 brought ``base`` and ``optimizer``, format 4 another kind of file."""
FIRST_WITH_FINGERPRINT = 3

_FIELDS: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {
        "scope": (dict,),
        "adapter": (dict, type(None)),
        "tensors": (dict,),
        "layer": (int, type(None)),
        "num_evaluations": (int,),
        "model": (str,),
        "layer_origin": (str,),
        "dtype": (str,),
        "trust_remote_code": (bool,),
        "noise_seed": (int,),
        "num_nonfinite": (int,),
    }
)
_FIELDS_OF_3: Mapping[str, tuple[type, ...]] = MappingProxyType(
    {**_FIELDS, "base": (dict,), "optimizer": (dict,), "onednn": (bool, type(None))}
)


def check_note(note: Any, option: str) -> None:
    """Refuse a note that slzo has not written like this; ``option`` begins the message.

    Raises:
        SlzoError: It is of another format, lacks a field, or has one of another type.
    """
    found = note.get("format") if isinstance(note, dict) else None
    if found not in FORMATS:
        raise SlzoError(
            f"{option}: has format {found!r}, this slzo reads {FORMATS[0]} to {FORMATS[-1]}; use the version that wrote it"
        )
    for name, types in (_FIELDS if found < FIRST_WITH_FINGERPRINT else _FIELDS_OF_3).items():
        value = note.get(name, _Missing)
        is_bool = isinstance(value, bool) and bool not in types
        if is_bool or not isinstance(value, types):
            told = "is missing" if value is _Missing else f"is a {type(value).__name__}"
            raise SlzoError(f"{option}: its note is broken: {name} {told}; give a checkpoint as slzo wrote it")
    for name, entry in note["tensors"].items():
        if not _is_description(entry):
            raise SlzoError(
                f"{option}: its note is broken: tensor {name!r} has no usable description; give a checkpoint as slzo wrote it"
            )


class _Missing:
    """Stands for a field that is not there."""


def _is_description(entry: Any) -> bool:
    """Whether kind, shape and constants of a tuned tensor are of the right types; see TunedTensors.description."""
    if not isinstance(entry, dict) or not isinstance(entry.get("kind"), str):
        return False
    shape = entry.get("shape")
    sizes = isinstance(shape, list | tuple) and all(type(size) is int and size >= 0 for size in shape)
    constants = [value for name, value in entry.items() if name not in ("kind", "shape")]
    return sizes and all(isinstance(value, Tensor) for value in constants)
