"""What an object was made with, to tell whether results or checkpoints are of the same options."""

import inspect
from collections.abc import Mapping
from typing import Any


def constructor_settings(thing: object) -> dict[str, Any]:
    """Class and constructor arguments, which scopes, estimators, rules and tasks keep as attributes of the same names."""
    names = [name for name in inspect.signature(type(thing)).parameters if hasattr(thing, name)]
    return {"class": type(thing).__qualname__, **{name: getattr(thing, name) for name in names}}


def flat_settings(option: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one object as ``option``, its class, and ``option.NAME`` for each argument."""
    return {option if name == "class" else f"{option}.{name}": value for name, value in settings.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, as ``name: old -> new``."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)
