"""Finds the wrong option, and says in one line what it takes.

For a wrong value, jsonargparse lists everything that it tried. This module checks the given options one by one against the types
of the parser. It shows the message of the library only if it finds nothing.
"""

import difflib
import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from slzo.cli.given import loaded, parents
from slzo.cli.option_types import (
    argument_types,
    class_at,
    classes_of,
    describe_type,
    entry_type,
    fits,
    imported_class,
    types_in,
)
from slzo.private.parsers import options_of, type_of
from slzo.utils.class_paths import import_failure, is_function, required_arguments
from slzo.utils.errors import SlzoError, did_you_mean
from slzo.utils.settings import Given

_MAX_CHOICES = 40
_MAX_LISTED = 8
_ALMOST_EQUAL = 0.85  # similarity of two names, from 0 to 1
_LISTED_PACKAGES = ("lightning", "slzo", "torch")
# jsonargparse would call a function given for these while it reads the config
_MADE_LATER = {"model.optimizer": "torch.optim.Optimizer", "model.lr_scheduler": "torch.optim.lr_scheduler.LRScheduler"}
_NESTED = (
    "its schedulers need the optimizer; write a function that returns it, def make(optimizer: Optimizer) -> LRScheduler, and "
    "give MODULE.make"
)
_UNUSABLE = {
    "ReduceLROnPlateau": "it needs a metric at every step, and there is one only after validations; use another scheduler",
    "ChainedScheduler": _NESTED,
    "SequentialLR": _NESTED,
}
_YAML_WORDS = "; YAML reads yes, no, on and off without quotes as true or false, so put texts in quotes"
_YAML_TIMES = "; YAML reads a time such as 12:00:00:00 without quotes as a number, so put it in quotes"


def check_class_paths(parser: ArgumentParser, given: Sequence[Given]) -> None:
    """Import the classes of class paths, so that an error in a user's own file is reported in one line.

    Raises:
        SlzoError: A class cannot be imported or used, or is a function.
    """
    hints = _hints(parser, given)
    for option in given:
        value = option.value
        kind = _class(hints, option.name, value)
        if kind is not None and kind.__module__.startswith("torch.") and kind.__name__ in _UNUSABLE:
            raise SlzoError(f"{option.name} {value!r}: cannot be used: {_UNUSABLE[kind.__name__]}")
        if not isinstance(value, str) or "." not in value or not classes_of(hints.get(option.name)):
            continue
        if not value.replace(".", "").replace("_", "").isalnum():
            continue
        # a wrong name in a listed package is reported later, with the names that it has
        if reason := import_failure(value, only_module=value.partition(".")[0] in _LISTED_PACKAGES):
            raise SlzoError(f"{option.name} {value!r}: {reason}")
        if option.name in _MADE_LATER and option.is_class_path and is_function(value):
            raise SlzoError(
                f"{option.name} {value!r}: is a function; class_path takes a class, so give the path of one"
            )


def explain(parser: ArgumentParser, command: str, given: Sequence[Given], message: str) -> str:
    """Return one line about the first wrong option of a command; the parser's own message if none is found."""
    hints = _hints(parser, given)
    defaults = {action.dest: action.default for action in options_of(parser)}
    named = {each.name: kind for each in given if (kind := _class(hints, each.name, each.value))}
    chosen: dict[str, type] = {}  # by option, as far as the options so far choose them
    for option in given:
        for owner in parents(option.name):  # with a default, the class may also come later
            default: Any = defaults.get(owner)
            path = default.get("class_path") if hasattr(default, "get") else None
            if owner not in chosen and (kind := _class(hints, owner, path)):
                chosen[owner] = named.get(owner, kind)
        if line := _problem(option, command, hints, chosen):
            return line
        if kind := _class(hints, option.name, option.value):
            chosen[option.name] = kind
    if line := _missing_argument(given, hints, chosen) or _missing_option(parser, given):
        return line
    line = " ".join(message.split())
    stray = line.startswith("unrecognized arguments")
    return f"{line}; write each value after its own option, as in --config A --config B" if stray else line


def _missing_argument(given: Sequence[Given], hints: Mapping[str, Any], classes: Mapping[str, type]) -> str:
    """Return a line about a chosen class that lacks an argument; empty if there is none."""
    for name, kind in classes.items():
        arguments = {each.name.split(".")[name.count(".") + 1] for each in given if each.name.startswith(f"{name}.")}
        missing = [
            each for each in required_arguments(kind) if each not in arguments and not _takes(hints[name], kind, each)
        ]
        if missing:
            needed = f"{name}: the chosen class needs {', '.join(missing)}; set {name}.{missing[0]}"
            return f"{needed}; {_help_of(name, kind)}"
    return ""


def _missing_option(parser: ArgumentParser, given: Sequence[Given]) -> str:
    """Return a line about a required option that is not given; empty if there is none."""
    names = {option.name for option in given}
    for action in options_of(parser):
        if action.required and action.dest not in names:
            text = " ".join((action.help or "a value").split()).removesuffix(".")
            return f"{action.dest}: is required; give --{action.dest} VALUE: {text[0].lower()}{text[1:]}"
    return ""


def check_values(parser: ArgumentParser, options: Any) -> None:
    """Refuse null in a config for an option that must have a value, and a value for a group; the parser accepts both.

    Raises:
        SlzoError: Such an option is null, or a group has a value.
    """
    options_with_value = {action.dest for action in options_of(parser) if type_of(action) is not None}
    outer = {parent for name in options_with_value for parent in parents(name)}
    for group in sorted(outer - options_with_value):
        value = options.get(group, {})
        if not isinstance(value, Mapping | Namespace):
            raise SlzoError(_group_problem(group, value))
    for action in options_of(parser):
        hint = type_of(action)
        if hint is None or action.default is None or type(None) in types_in(hint):
            continue
        if options.get(action.dest, action.default) is None:
            raise SlzoError(
                f"{action.dest} null: expected {describe_type(hint)}; leave it out for its default, {action.default}"
            )


def _problem(option: Given, command: str, hints: Mapping[str, Any], classes: Mapping[str, type]) -> str:
    """Return what is wrong with an option; empty if nothing is found."""
    name, value = option.name, option.value
    if name in hints:
        is_group = hints[name] is None and any(each.startswith(f"{name}.") for each in hints)
        if is_group and not (isinstance(value, str) and Path(value).is_file()):
            return _group_problem(name, value)
        return _value_problem(name, value, hints[name], option.is_class_path)
    owner = next((each for each in parents(name) if classes_of(hints.get(each))), None)
    if owner is None:
        if any(typing.get_origin(item) is dict for each in parents(name) for item in types_in(hints.get(each))):
            return ""  # a key of a mapping, such as model.device_map
        options = [
            *hints,
            *(f"{each}.{argument}" for each, kind in classes.items() for argument in argument_types(kind)),
        ]
        advice = _option_of_a_class(name, hints, classes) or _suggestion(name, options) or f"see slzo {command} --help"
        return f"{name}: unknown option; {advice}"
    if owner not in classes:
        names = ", ".join(sorted(classes_of(hints[owner])))
        return f"{name}: give the class before its options, as in --{owner} CLASS --{name} VALUE; choose one of {names}"
    kind = classes[owner]
    argument, _, key = name.removeprefix(f"{owner}.").partition(".")
    types = argument_types(kind)
    is_known = bool(types) or inspect.getattr_static(kind, "__init__") is object.__init__
    if argument == "help" or not is_known:
        return ""
    if argument not in types:
        group = owner.partition(".")[0]
        hint = did_you_mean(argument, types, _help_of(owner, kind))
        if f"{group}.{argument}" in hints:
            hint = f"did you mean {group}.{argument}?"
        known = ", ".join(types) or "none"
        return f"{name}: unknown option of the chosen class {kind.__name__}, which has {known}; {hint}"
    own = types[argument]
    if (key and classes_of(own)) or (name, value) == ("model.optimizer.lr", "auto"):  # auto: see auto_values.py
        return ""
    if key:
        name, value = f"{owner}.{argument}", {key: value}
    elif isinstance(loaded(value), list):  # the parser does so with such texts, whatever the type
        value = loaded(value)
    if value in (None, "null") and argument in required_arguments(kind) and type(None) not in types_in(own):
        line = f"{name} null: expected {describe_type(own)}"
    else:
        line = _value_problem(name, value, own)
    return f"{line}; {_help_of(owner, kind)}" if line else ""


def _group_problem(name: str, value: Any) -> str:
    if isinstance(value, str):
        way = f"set its options with --{name}.NAME VALUE, or give a YAML file"
    else:  # of a config; values of the command line are texts
        way = f"leave {name} out, or write its options below it, each as NAME: VALUE"
    return f"{name} {_shown(value)}: a group of options takes no value; {way}"


def _hints(parser: ArgumentParser, given: Sequence[Given]) -> dict[str, Any]:
    """Return the types of all options, of given classes inside lists, and of classes that other classes take."""
    hints = {action.dest: type_of(action) for action in options_of(parser)}
    classes: dict[str, type] = {}
    for option in given:
        outer, _, last = option.name.rpartition(".")
        if option.name not in hints and last.isdigit() and outer in hints:
            hints[option.name] = entry_type(hints[outer])
        elif option.name not in hints and option.is_class_path and outer in classes:
            hints[option.name] = argument_types(classes[outer]).get(last)
        if kind := _class(hints, option.name, option.value):
            classes[option.name] = kind
    return hints


def _class(hints: Mapping[str, Any], name: str, path: Any) -> type | None:
    """Return the class of a path that an option takes; ``None`` for other values."""
    return class_at(classes_of(hints.get(name)), path) if isinstance(path, str) else None


def _help_of(name: str, kind: type) -> str:
    option = ".".join(part for part in name.split(".") if not part.isdigit())  # without the place in a list
    return f"see --{option}.help {kind.__name__}"


def _option_of_a_class(name: str, hints: Mapping[str, Any], given: Mapping[str, type]) -> str:
    """Suggest an argument with this name of the classes that an option of the same group takes; empty if there is none."""
    group, _, argument = name.rpartition(".")
    for option in hints:
        if option.rpartition(".")[0] != group:
            continue
        if option in given:
            if argument in argument_types(given[option]):
                return f"did you mean {option}.{argument}?"
            continue
        kinds = sorted(each for each, kind in classes_of(hints[option]).items() if argument in argument_types(kind))
        if kinds:
            shown = ", ".join(kinds[:_MAX_LISTED]) + (", ..." if len(kinds) > _MAX_LISTED else "")
            return f"did you mean {option}.{argument}, an option of {shown}?"
    return ""


def _suggestion(name: str, known: Sequence[str]) -> str:
    """Suggest an option for an unknown name, from the same group if that exists; otherwise list a small group.

    A name that is much closer to one of another group is taken for that. Empty if no name is close.
    """
    for group in parents(name):
        members = [option for option in known if option.startswith(f"{group}.")]
        if not members:
            continue
        last, ends = name.removeprefix(f"{group}."), [option.removeprefix(f"{group}.") for option in members]
        elsewhere = {option.rpartition(".")[2]: option for option in known if option not in members}
        near = difflib.get_close_matches(last, [*ends, *elsewhere], n=1, cutoff=_ALMOST_EQUAL)
        if near and near[0] not in ends:
            return f"did you mean {elsewhere[near[0]]}?"
        listed = f"{group} has {', '.join(ends)}" if len(ends) <= _MAX_LISTED else ""
        return did_you_mean(last, ends, listed, before=f"{group}.", cutoff=0.5)
    return did_you_mean(name, known)


def _value_problem(name: str, value: Any, hint: Any, is_class_path: bool = False) -> str:
    if hint is None or fits(hint, {"class_path": value} if is_class_path else value):
        return ""
    shown, names = _shown(value), sorted(classes_of(hint))
    if names:
        given = str(value).rpartition(".")[2]
        if given in names:
            return ""  # the class is right, but one of its arguments is wrong
        names = [each for each in names if each not in _UNUSABLE]
        listed = ", ".join(names[:_MAX_CHOICES]) + (", ..." if len(names) > _MAX_CHOICES else "")
        if "." in str(value) and (kind := imported_class(str(value))) is not None:
            bases = tuple(item for item in types_in(hint) if inspect.isclass(item) and not typing.get_origin(item))
            if inspect.isabstract(kind) and issubclass(kind, bases):
                missing = ", ".join(sorted(getattr(kind, "__abstractmethods__", ())))
                return f"{name} {shown}: does not define {missing} (docs/extending.md)"
            return f"{name} {shown}: is not one of the expected classes; give one such as {listed}"
        if name in _MADE_LATER and "." in str(value) and not import_failure(str(value)) and is_function(str(value)):
            return f"{name} {shown}: is a function that does not say what it returns; annotate it with -> {_MADE_LATER[name]}"
        near = did_you_mean(given, names)
        advice = f"{near} choose" if near else "choose"
        return f"{name} {shown}: no such class; {advice} one of {listed}, or give the full path of your own class"
    types = list(types_in(hint))
    literals = [
        str(each) for item in types if typing.get_origin(item) is typing.Literal for each in typing.get_args(item)
    ]
    if literals and not any(typing.get_origin(item) is list or item in (int, float) for item in types):
        return f"{name} {shown}: choose one of {', '.join(literals)}"
    read = loaded(value)
    values = read if isinstance(read, list) else [read]
    words = _YAML_WORDS if str in types and any(isinstance(each, bool) for each in values) else ""
    if timedelta in types and type(read) is int:  # not true and false
        words = _YAML_TIMES
    return f"{name} {shown}: expected {describe_type(hint)}{words}"


def _takes(hint: Any, kind: type, argument: str) -> bool:
    """Whether slzo passes an argument itself when it calls the chosen class, such as an optimizer's parameters."""
    return (
        any(typing.get_origin(item) is Callable for item in types_in(hint))
        and argument in list(inspect.signature(kind).parameters)[:1]
    )


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str | list | dict) else f"'{value}'"
