"""One clear line for a mistake in a config or on the command line."""

import difflib
import inspect
import re
import typing
from argparse import Action
from collections.abc import Callable, Iterator
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

_UNKNOWN = (
    r"[Kk]ey '?\"?([\w.]+)'?\"? is not expected",
    r"[Uu]nrecognized arguments: --([\w.]+)",
    r"No action for key '?\"?([\w.]+)",
    r"does not accept (?:option|nested key) '?\"?([\w.]+)",
)
_MAX_CHOICES = 40
_UNUSABLE = {
    "ReduceLROnPlateau": "it needs a metric at every step, and there is one only after validations; use another scheduler"
}


def one_line(message: str, parser: ArgumentParser) -> str:
    """The parser's message on one line, with the value, what is allowed and the nearest known name.

    Args:
        message: As jsonargparse has it, often many lines.
        parser: Knows the options.
    """
    text = " ".join(message.split())
    for pattern in _UNKNOWN:
        if found := re.search(pattern, text):
            return _unknown_option(found[1], parser)
    if found := re.fullmatch(r"Option '(\w+)' is not accepted", text):
        return f"{found[1]}: unknown option of the chosen class; see slzo COMMAND --OPTION.help CLASS for those it has"
    found = re.match(r"Parser key \"([\w.]+)\":? ?(.*)", text)
    if not found:
        return text
    key, detail = found[1], found[2]
    if missing := re.search(r"the following arguments are required: ([\w, ]+?)(?: -|$)", detail):
        return f"{key}: the chosen class needs {missing[1]}; set {key}.{missing[1].split(',')[0]}"
    value = _given_value(detail)
    if key == "config" and value is None:
        return f"--config: {detail[0].lower() + detail[1:]}; check the path"
    action = next((action for action in parser._actions if action.dest == key), None)
    if action is None or value is None:
        return f"{key}: {detail}"
    return f"{key} {value!r}: {_allowed(action, value)}"


def _unknown_option(name: str, parser: ArgumentParser) -> str:
    known = sorted({action.dest for action in _actions(parser) if "." in action.dest})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name}: unknown option; " + (f"did you mean {near[0]}?" if near else "see slzo COMMAND --help")


def _actions(parser: ArgumentParser) -> Iterator[Action]:
    """Options of a parser and of its commands."""
    yield from parser._actions
    for action in parser._actions:
        if isinstance(action.choices, dict):
            for command in action.choices.values():
                yield from command._actions


def _given_value(detail: str) -> str | None:
    found = re.search(r"(?:Got|Given) value: (.*?)(?: - |$)", detail)
    if not found:
        return None
    nested = re.search(r"NestedArg\(.*val='?([^')]*)", found[1])
    return nested[1] if nested else found[1].strip()


def _allowed(action: Action, value: str) -> str:
    hint = getattr(action, "_typehint", None) or action.type
    classes = list(_classes(hint))
    if classes:
        names = sorted({name for base in classes for name in _subclass_names(base)})
        given = value.rpartition(".")[2]
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
        if given in names and given in _UNUSABLE:
            return f"cannot be used: {_UNUSABLE[given]}"
        shown = ", ".join(names[:_MAX_CHOICES]) + (", ..." if len(names) > _MAX_CHOICES else "")
        advice = f"did you mean {near[0]}? " if near else ""
        return f"no such class; {advice}choose one of {shown}, or give the full path of your own class"
    literals = [str(item) for item in _literals(hint)]
    if literals:
        return f"choose one of {', '.join(literals)}"
    return f"expected {_type_name(hint)}"


def _arguments(hint: Any) -> Iterator[Any]:
    """A type hint and all hints inside it; of a callable only what it returns."""
    yield hint
    origin = typing.get_origin(hint)
    inner = typing.get_args(hint)
    if origin in (Callable, typing.Callable):
        inner = inner[-1:]
    if origin is not typing.Literal:
        for item in inner:
            yield from _arguments(item)


def _classes(hint: Any) -> Iterator[type]:
    for item in _arguments(hint):
        if (
            inspect.isclass(item)
            and not issubclass(item, Tensor)
            and item.__module__ not in ("builtins", "pathlib", "datetime")
            and not typing.get_origin(item)
        ):
            yield item


def _literals(hint: Any) -> Iterator[Any]:
    for item in _arguments(hint):
        if typing.get_origin(item) is typing.Literal:
            yield from typing.get_args(item)


def _subclass_names(base: type) -> Iterator[str]:
    children: list[type] = base.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child.__name__
        yield from _subclass_names(child)


def _type_name(hint: Any) -> str:
    names = [getattr(item, "__name__", str(item)) for item in _arguments(hint) if not typing.get_args(item)]
    plain = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "NoneType": "null"}
    return " or ".join(dict.fromkeys(plain.get(name, name) for name in names))
