"""What an object was made with, to tell whether results or checkpoints are of the same options."""

import inspect
from collections.abc import Mapping
from typing import Any


def constructor_settings(thing: object) -> dict[str, Any]:
    """Class and constructor arguments, which scopes, estimators and rules keep as attributes of the same names."""
    names = [name for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)]
    return {"class": type(thing).__qualname__, **{name: getattr(thing, name) for name in names}}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, as ``name: old -> new``."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)
