"""Settings of objects and options in configs, by dotted name."""

import inspect
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import PurePath
from typing import Any

from slzo.utils.errors import SlzoError


def constructor_settings(thing: object, option: str) -> dict[str, Any]:
    """Return the class name and the constructor arguments, which the object must keep as attributes of the same names.

    Args:
        thing: A scope, estimator, rule or task.
        option: Name of the option that chose it, for messages.

    Returns:
        Primitives, and lists and dictionaries of them; a path becomes its text, a member of an enum its name.

    Raises:
        SlzoError: An argument is not kept as an attribute, or has a type that a checkpoint cannot hold.
    """
    parameters = inspect.signature(type(thing)).parameters.values()
    names = [p.name for p in parameters if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    for name in names:
        if not hasattr(thing, name):
            raise SlzoError(
                f"{option}: {type(thing).__qualname__} must keep its argument {name} as an attribute of that name, so that a "
                "checkpoint can record its value"
            )
    values = {name: _primitive(getattr(thing, name), f"{option}.{name}") for name in names}
    return {"class": type(thing).__qualname__, **values}


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
    """Flatten the settings of one object: its class as ``option``, and each argument as ``option.NAME``."""
    return {option if name == "class" else f"{option}.{name}": value for name, value in settings.items()}


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Return the settings that differ, as ``name: old -> new``."""
    names = [name for name in sorted(old.keys() | new.keys()) if old.get(name) != new.get(name)]
    return "; ".join(f"{name}: {_shown(old.get(name))} -> {_shown(new.get(name))}" for name in names)


def _shown(value: object) -> str:
    """Return the text of a value, in quotes if it has line breaks, or white space at its ends."""
    is_plain = not isinstance(value, str) or (value.isprintable() and value == value.strip())
    return str(value) if is_plain else repr(value)


@dataclass(frozen=True)
class Given:
    """An option as it was given.

    Attributes:
        name: Dotted name, without ``init_args``; a class in a list has its place as a further part, from 0.
        value: A string from the command line, or a value from a config.
        is_class_path: Whether it was given as the ``class_path`` of the option.
    """

    name: str
    value: Any
    is_class_path: bool = False


def options_in(config: Mapping[str, Any], before: str = "") -> Iterator[Given]:
    """Yield the options of a nested mapping; a class comes as its path, followed by its arguments."""
    for key, value in sorted(config.items(), key=lambda item: item[0] != "class_path"):
        name = plain_name(f"{before}.{key}" if before else str(key))
        if key == "class_path":
            yield Given(before, value, True)
        elif key in ("init_args", "dict_kwargs") and isinstance(value, Mapping):
            yield from options_in(value, before)
        elif isinstance(value, Mapping) and value:
            yield from options_in(value, name)
        elif isinstance(value, list) and any(isinstance(each, Mapping) and "class_path" in each for each in value):
            yield from options_in({str(place): each for place, each in enumerate(value)}, name)
        else:
            yield Given(name, value)


def plain_name(name: str) -> str:
    """Return the name of an option without the parts that only its YAML has."""
    return name.replace(".init_args.", ".").removesuffix(".class_path")
