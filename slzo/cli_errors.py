"""One clear line for a mistake in a config or on the command line."""

import difflib
import inspect
import re
import typing
from argparse import Action
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser
from torch import Tensor

from slzo.class_paths import import_failure
from slzo.errors import SlzoError
from slzo.renames import RENAMED

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
    """The parser's message, often many lines, on one: with the value, what is allowed and the nearest known name."""
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
    action = next((action for action in parser._actions if action.dest == key), None)
    nested = re.search(r"Given value: NestedArg\(key='(\w+)'", detail)
    if nested and nested[1] != "class_path":
        return _option_of_class(key, nested[1], detail, action, parser)
    value = _given_value(detail)
    if key == "config" and value is None:
        return f"--config: {detail[0].lower() + detail[1:]}; check the path"
    if action is None or value is None:
        return f"{key}: {detail}"
    return f"{key} {value!r}: {_allowed(action, value)}"


def check_nulls(parser: ArgumentParser, options: Any) -> None:
    """Refuse null in a config for an option that must have a value; the parser lets it pass.

    Raises:
        SlzoError: With the option.
    """
    for action in parser._actions:
        hint = getattr(action, "_typehint", None)
        if hint is None or action.default is None or type(None) in _arguments(hint):
            continue
        if options.get(action.dest, action.default) is None:
            raise SlzoError(
                f"{action.dest} null: expected {_type_name(hint)}; leave it out for its default, {action.default}"
            )


def with_option(message: str, args: Sequence[str]) -> str:
    """A message about an argument of an optimizer or scheduler, which its parser does not know the option of."""
    found = re.match(r"(\w+) '.*': expected ", message)
    names = [arg.partition("=")[0].removeprefix("--") for arg in args if arg.startswith("--")]
    option = next((name for name in names if found and name.endswith(f".{found[1]}")), None)
    return message if found is None or option is None else option + message.removeprefix(found[1])


def _unknown_option(name: str, parser: ArgumentParser) -> str:
    if name in RENAMED:
        return f"{name}: is called {RENAMED[name]} now"
    parsers = [parser]
    for action in parser._actions:
        parsers += action.choices.values() if isinstance(action.choices, dict) else []
    known = sorted({action.dest for each in parsers for action in each._actions if "." in action.dest})
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"{name}: unknown option; " + (f"did you mean {near[0]}?" if near else "see slzo COMMAND --help")


def _option_of_class(key: str, name: str, detail: str, action: Action | None, parser: ArgumentParser) -> str:
    """A wrong option of the class that another option chooses; its own message stands among the parser's errors."""
    if f"{key}.{name}" in RENAMED:
        return _unknown_option(f"{key}.{name}", parser)
    if "Expected an instantiatable class" in detail:
        names = [] if action is None else _choices(action)
        which = f", one of {', '.join(names)}" if names else ""
        return f"{key}.{name}: the class comes before its options{which}: --{key} CLASS --{key}.{name} VALUE"
    inner = re.search(r"Errors: - (.*?)(?: - Expected a <class 'NoneType'>| Given value type:)", detail)
    # of the other types that the option may have
    told = re.sub(r"^(Expected an? <class '[\w.]+'> - )+", "", inner[1] if inner else detail)
    if re.search(r"'\[?(True|False)\b.*expected (a list|a text)", told):
        told += "; YAML reads yes, no, on and off without quotes as true or false"
    if not re.match(rf"{name}\b", told):
        return f"{key}.{name}: {told}"
    return f"{key}.{told}".replace("--OPTION.help", f"--{key}.help")


def _given_value(detail: str) -> str | None:
    nested = re.search(r"NestedArg\(.*val='?([^')]*)", detail)
    found = [nested[1]] if nested else re.findall(r"(?:Got|Given) value:(.*?)(?= - | Given value|$)", detail)
    return found[-1].strip() if found else None


def _allowed(action: Action, value: str) -> str:
    hint = _hint(action)
    names = _choices(action)
    path = _class_path(value)
    listed = path.split(".")[0] in ("lightning", "slzo", "torch")  # their classes are told instead
    if names and "." in path and (reason := import_failure(path)) and not (listed and " has no " in reason):
        return reason
    if names:
        given = path.rpartition(".")[2]
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
        if given in names and given in _UNUSABLE:
            return f"cannot be used: {_UNUSABLE[given]}"
        shown = ", ".join(names[:_MAX_CHOICES]) + (", ..." if len(names) > _MAX_CHOICES else "")
        advice = f"did you mean {near[0]}? " if near else ""
        return f"no such class; {advice}choose one of {shown}, or give the full path of your own class"
    inner = list(_arguments(hint))
    literals = [str(v) for item in inner if typing.get_origin(item) is typing.Literal for v in typing.get_args(item)]
    if literals and not any(typing.get_origin(item) is list or item in (int, float) for item in inner):
        return f"choose one of {', '.join(literals)}"
    return f"expected {_type_name(hint)}"


def _class_path(value: str) -> str:
    """The class path in a value, which may be the text of a mapping with it."""
    found = re.search(r"class_path['\"]?\s*[:=]\s*['\"]?([\w.]+)", value)
    return found[1] if found else value


def _hint(action: Action) -> Any:
    return getattr(action, "_typehint", None) or action.type


def _choices(action: Action) -> list[str]:
    return class_names(_hint(action))


def class_names(hint: Any) -> list[str]:
    """Names of the classes that an option of a type takes, if it takes classes."""
    names: set[str] = set()
    for item in _arguments(hint):
        is_class = inspect.isclass(item) and not typing.get_origin(item) and not issubclass(item, Tensor)
        if is_class and item.__module__ not in ("builtins", "pathlib", "datetime"):
            names.update(_subclass_names(item))
    return sorted(names)


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


def _subclass_names(base: type) -> Iterator[str]:
    children: list[type] = base.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child.__name__
        yield from _subclass_names(child)


_PLAIN = {"int": "a whole number", "float": "a number", "str": "a text", "bool": "true or false", "NoneType": "null"}
_LISTS = {"int": "a list like [1, 2]", "float": "a list like [0.1, 0.2]", "str": "a list like [a, b]"}


def _type_name(hint: Any) -> str:
    inner = typing.get_args(hint)
    if not inner:
        name = getattr(hint, "__name__", str(hint))
        return _PLAIN.get(name, name)
    origin = typing.get_origin(hint)
    if origin is typing.Literal:
        return " or ".join(str(item) for item in inner)
    if origin is list:
        return _LISTS.get(getattr(inner[0], "__name__", ""), "a list")
    if origin is dict:
        return "a mapping"
    return " or ".join(dict.fromkeys(_type_name(item) for item in inner if item is not Tensor))
