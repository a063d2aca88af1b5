"""What the type of an option accepts, and how it is described in words."""

import inspect
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from importlib import import_module
from types import UnionType
from typing import Any, Union

from jsonargparse import ArgumentParser

from slzo.private.parsers import options_of, type_of

_PLAIN = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
_LISTS = {"int": "a list like [1, 2]", "float": "a list like [0.1, 0.2]", "str": 'a list of texts like ["a", "b"]'}


def describe_type(hint: Any) -> str:
    """Describe in words what an option takes."""
    inner = typing.get_args(hint)
    if not inner:
        name = getattr(hint, "__name__", str(hint))
        return _PLAIN.get(name, name)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(str(item) for item in inner)
    if origin is list:
        if typing.get_origin(inner[0]) in (Union, UnionType) and _PLAIN.keys() >= {
            getattr(item, "__name__", "") for item in typing.get_args(inner[0])
        }:
            return f"a list (each entry {describe_type(inner[0])})"
        return _LISTS.get(getattr(inner[0], "__name__", ""), "a list")
    if origin is dict:
        return "a mapping"
    if origin is Callable:
        return "the path of a function, such as my_module.my_function"
    if origin is tuple:
        return "a list" if Ellipsis in inner else f"a list of {len(inner)} values"
    return " or ".join(dict.fromkeys(describe_type(item) for item in inner if not _is_tensor(item)))


def fits(hint: Any, value: Any) -> bool:
    """Whether an option of a type accepts a value."""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_argument("--value", type=hint)
    try:
        if isinstance(value, str):
            parser.parse_args([f"--value={value}"])
        else:
            parser.parse_object({"value": value})
    except Exception:  # whatever the parser raises
        return False
    return True


def classes_of(hint: Any) -> dict[str, type]:
    """Return the classes that an option takes, by name; empty if it takes none."""
    found: dict[str, type] = {}
    for item in types_in(hint):
        is_class = inspect.isclass(item) and not typing.get_origin(item) and not _is_tensor(item)
        # Python 3.13 has Path in pathlib._local
        if is_class and item.__module__.partition(".")[0] not in ("builtins", "pathlib", "datetime"):
            for kind in _subclasses(item):
                found.setdefault(kind.__name__, kind)  # torch comes before other packages with the same name
    return found


def argument_types(kind: type) -> dict[str, Any]:
    """Return the types of a class's arguments, also of those that it passes on to its base class; empty if they are unknown."""
    parser = ArgumentParser(exit_on_error=False)
    try:
        parser.add_class_arguments(kind, "made", fail_untyped=False)
    except Exception:  # whatever annotations raise
        return {}
    found = {action.dest.removeprefix("made."): type_of(action) for action in options_of(parser)}
    return {name: hint for name, hint in found.items() if name.isidentifier() and name not in ("help", "made")}


def entry_type(hint: Any) -> Any:
    """Return the type of an entry if an option takes a list, otherwise the option's own type."""
    lists = (item for item in types_in(hint) if typing.get_origin(item) in (list, Iterable))
    return next((typing.get_args(item)[0] for item in lists), hint)


def class_at(kinds: Mapping[str, type], path: str) -> type | None:
    """Return the class of a path or a name; a path is exact if several packages have a class of that name."""
    kind = kinds.get(path.rpartition(".")[2])
    return kind if kind is None else imported_class(path) or kind


def imported_class(path: str) -> type | None:
    """Return the class of a path; ``None`` if it cannot be imported."""
    module, _, name = path.rpartition(".")
    try:
        found = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError, TypeError):  # TypeError: a path such as ./own.Class
        return None
    return found if isinstance(found, type) else None


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child
        yield from _subclasses(child)


def types_in(hint: Any) -> Iterator[Any]:
    """Yield a type hint and all hints inside it; for a callable only its return type."""
    yield hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is not typing.Literal:
        for item in inner[-1:] if origin is Callable else inner:
            yield from types_in(item)


def _is_tensor(hint: Any) -> bool:
    """Whether a type is torch's tensor, which no option takes; works without loading torch."""
    return getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") == "Tensor"
