"""What an object was made with, to tell whether results or checkpoints are of the same options."""

import inspect
from collections.abc import Mapping
from enum import Enum
from pathlib import PurePath
from typing import Any

from slzo.utils.errors import SlzoError


def constructor_settings(thing: object, option: str) -> dict[str, Any]:
    """Class and constructor arguments, which scopes, estimators, rules and tasks keep as attributes of the same names.

    Args:
        thing: The object.
        option: That chose it, for the message.

    Returns:
        Primitives, lists and dictionaries of them; a path as its text, an enum's member as its name.

    Raises:
        SlzoError: An argument is not kept, or of another type, which no checkpoint could hold.
    """
    parameters = inspect.signature(type(thing)).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for name in names:
        if not hasattr(thing, name):
            raise SlzoError(
                f"{option}: {type(thing).__qualname__} must keep its argument {name} as an attribute of that name, so that runs "
                "with another value can be told apart"
            )
    values = {name: _primitive(getattr(thing, name), f"{option}.{name}") for name in names}
    return {"class": type(thing).__qualname__, **values}


def with_defaults(settings: Mapping[str, Any], thing: object) -> dict[str, Any]:
    """Settings of a former version, with what it did not know as its present class has it when it is left out."""
    own = type(thing)
    parameters = inspect.signature(own).parameters.values() if settings.get("class") == own.__qualname__ else ()
    return {**{p.name: p.default for p in parameters if p.default is not p.empty}, **settings}


def _primitive(value: object, option: str) -> Any:
    if isinstance(value, Enum):
        return value.name
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, PurePath):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _primitive(item, option) for key, item in value.items()}
    if isinstance(value, list | tuple | set | frozenset | range):
        items = [_primitive(item, option) for item in value]
        return sorted(items, key=repr) if isinstance(value, set | frozenset) else items
    raise SlzoError(
        f"{option}: a {type(value).__name__} cannot be kept in a checkpoint; use numbers, texts, paths, enums, or lists and "
        "mappings of them"
    )


def flat_settings(option: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of one object as ``option``, its class, and ``option.NAME`` for each argument."""
    return {option if name == "class" else f"{option}.{name}": value for name, value in settings.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """What differs, as ``name: old -> new``."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {old.get(name)} -> {new.get(name)}" for name in names)
