"""Finds the wrong option, and says in one line what it takes.

For a wrong value, jsonargparse lists everything that it tried. This module checks the given options one by one against the types
of the parser. It shows the message of the library only if it finds nothing.
"""

import difflib
import inspect
import typing
from argparse import ArgumentError
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import yaml
from jsonargparse import ArgumentParser, Namespace

from slzo.private.parsers import options_of, type_of
from slzo.utils.class_paths import import_failure, required_arguments
from slzo.utils.errors import SlzoError

_MAX_CHOICES = 40
_MAX_LISTED = 8
_LISTED = ("lightning", "slzo", "torch")
_UNUSABLE = {
    "ReduceLROnPlateau": "it needs a metric at every step, and there is one only after validations; use another scheduler"
}
_PLAIN = {"int": "a whole number", "float": "a number", "str": "text", "bool": "true or false", "NoneType": "null"}
_LISTS = {"int": "a list like [1, 2]", "float": "a list like [0.1, 0.2]", "str": "a list like [a, b]"}
_YAML_WORDS = "; YAML reads yes, no, on and off without quotes as true or false"


@dataclass(frozen=True)
class Given:
    """An option as it was given.

    Attributes:
        name: Dotted name, without ``init_args``.
        value: A string from the command line, or a value from a config.
        is_class_path: Whether it was given as the ``class_path`` of the option.
    """

    name: str
    value: Any
    is_class_path: bool = False


def given_options(args: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[Given]:
    """Return the options in configs and on the command line; repeated options are all kept."""
    found = [option for config in configs for option in _flat(config)]
    rest = list(args)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            continue
        name, has_value, value = word[2:].partition("=")
        if not has_value:
            value = rest.pop(0) if rest and not rest[0].startswith("--") else ""
        content = _mapping(value)
        plain = _plain_name(name.removesuffix("+"))
        found += _flat(content, plain) if content else [Given(plain, value, name.endswith(".class_path"))]
    return found


def check_class_paths(parser: ArgumentParser, given: Sequence[Given]) -> None:
    """Import the classes of class paths, so that an error in a user's own file is reported in one line.

    Raises:
        SlzoError: A class cannot be imported.
    """
    hints = {action.dest: type_of(action) for action in options_of(parser)}
    for option in given:
        value = option.value
        if not isinstance(value, str) or "." not in value or not class_names(hints.get(option.name)):
            continue
        reason = import_failure(value) if value.replace(".", "").replace("_", "").isalnum() else ""
        if reason and not (value.partition(".")[0] in _LISTED and " has no " in reason):
            raise SlzoError(f"{option.name} {value!r}: {reason}")


def explain(parser: ArgumentParser, given: Sequence[Given], message: str) -> str:
    """Return one line about the first wrong option; the parser's own message if none is found."""
    hints = {action.dest: type_of(action) for action in options_of(parser)}
    classes = _chosen_classes(parser, given, hints)
    for number, option in enumerate(given):
        line = _problem(option, hints, classes) or _order_problem(parser, option, hints, given[:number], given[number:])
        if line:
            return line
    for name, (kind, arguments) in classes.items():
        missing = [
            each for each in required_arguments(kind) if each not in arguments and not _takes(hints[name], kind, each)
        ]
        if missing:
            return f"{name}: the chosen class needs {', '.join(missing)}; set {name}.{missing[0]}"
    names = {option.name for option in given}
    for action in options_of(parser):
        if action.required and action.dest not in names:
            text = " ".join((action.help or "a value").split()).removesuffix(".")
            return f"{action.dest}: is required; give --{action.dest} VALUE: {text[0].lower()}{text[1:]}"
    return " ".join(message.split())


def check_nulls(parser: ArgumentParser, options: Any) -> None:
    """Refuse null in a config for an option that must have a value; the parser accepts it.

    Raises:
        SlzoError: Such an option is null.
    """
    for action in options_of(parser):
        hint = type_of(action)
        if hint is None or action.default is None or type(None) in _types_in(hint):
            continue
        if options.get(action.dest, action.default) is None:
            raise SlzoError(
                f"{action.dest} null: expected {describe_type(hint)}; leave it out for its default, {action.default}"
            )


def constructor_problem(config: Namespace, groups: Mapping[str, type]) -> SlzoError | None:
    """Return the error of the first class that cannot be made with its options; ``None`` if each can be made.

    Args:
        config: The parsed options.
        groups: Classes whose arguments are a group of options, by name.
    """
    for name, kind in groups.items():
        if (error := _refusal(name, kind, config.get(name))) is not None:
            return error
    for name, path, arguments in _class_values(config):
        chosen = _imported(path)
        if chosen is not None and (error := _refusal(name, chosen, arguments)) is not None:
            return error
    return None


def _refusal(name: str, kind: type, arguments: Any) -> SlzoError | None:
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "made", fail_untyped=False)
    try:
        parser.instantiate_classes(parser.parse_object({"made": arguments or {}}))
    except SlzoError as error:
        return error
    except ArgumentError:  # an argument is passed later, such as an optimizer's parameters
        return None
    except Exception as error:  # whatever a class raises
        return SlzoError(f"{name}: {' '.join(str(error).split())}; see slzo COMMAND --help")
    return None


def _class_values(value: Any, name: str = "") -> Iterator[tuple[str, str, Any]]:
    """Yield option, class path and arguments of every class in parsed options."""
    if isinstance(value, list):
        for each in value:
            yield from _class_values(each, name)
    elif isinstance(value, Namespace | dict):
        content = dict(value.items(branches=True)) if isinstance(value, Namespace) else value
        if isinstance(content.get("class_path"), str):
            yield name, content["class_path"], content.get("init_args")
        own = vars(value) if isinstance(value, Namespace) else value
        for key, inner in own.items():
            if key not in ("class_path", "init_args"):
                yield from _class_values(inner, f"{name}.{key}" if name else key)


def _imported(path: str) -> type | None:
    module, _, name = path.rpartition(".")
    try:
        found: type = getattr(import_module(module), name)
    except (ImportError, AttributeError, ValueError):
        return None
    return found


def class_names(hint: Any) -> list[str]:
    """Return the names of the classes that an option takes; empty if it takes none."""
    return sorted(_classes(hint))


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
        return _LISTS.get(getattr(inner[0], "__name__", ""), "a list")
    if origin is dict:
        return "a mapping"
    return " or ".join(dict.fromkeys(describe_type(item) for item in inner if not _is_tensor(item)))


def _problem(option: Given, hints: Mapping[str, Any], classes: Mapping[str, tuple[type, set[str]]]) -> str:
    """Return what is wrong with an option; empty if nothing is found."""
    name, value = option.name, option.value
    if name in hints:
        is_group = hints[name] is None and any(each.startswith(f"{name}.") for each in hints)
        if is_group and not (isinstance(value, str) and Path(value).is_file()):
            return (
                f"{name} {_shown(value)}: a group of options takes no value; set its options with --{name}.NAME VALUE, or "
                "give a YAML file"
            )
        return _value_problem(name, value, hints[name], option.is_class_path)
    owner = next((each for each in _parents(name) if class_names(hints.get(each))), None)
    if owner is None:
        return f"{name}: unknown option; {_suggestion(name, list(hints))}"
    if owner not in classes:
        return _class_comes_first(name, owner, hints)
    kind = classes[owner][0]
    argument = name.removeprefix(f"{owner}.").partition(".")[0]
    parameters = inspect.signature(kind).parameters
    if argument == "help" or any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return ""
    if argument not in parameters:
        listed = ", ".join(each for each in parameters if each != "self")
        near = difflib.get_close_matches(argument, list(parameters), n=1)
        hint = f"; did you mean {near[0]}?" if near else ""
        return f"{name}: unknown option of the chosen class {kind.__name__}, which has {listed}{hint}"
    try:
        own = typing.get_type_hints(kind.__init__).get(argument)  # type: ignore[misc]
    except (NameError, TypeError):  # annotations that cannot be resolved
        return ""
    if own is None or f"{owner}.{argument}" != name:
        return ""
    # the parser turns this text into a mapping, whatever the type
    return _value_problem(name, {} if value == "{}" else value, own)


def _suggestion(name: str, known: Sequence[str]) -> str:
    """Suggest an option for an unknown name, from the same group if that exists; otherwise list a small group."""
    for group in _parents(name):
        members = [option for option in known if option.startswith(f"{group}.")]
        if not members:
            continue
        last, ends = name.removeprefix(f"{group}."), {option.removeprefix(f"{group}."): option for option in members}
        if near := difflib.get_close_matches(last, list(ends), n=1, cutoff=0.5):
            return f"did you mean {ends[near[0]]}?"
        return f"{group} has {', '.join(ends)}" if len(ends) <= _MAX_LISTED else "see slzo COMMAND --help"
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    return f"did you mean {near[0]}?" if near else "see slzo COMMAND --help"


def _order_problem(
    parser: ArgumentParser, option: Given, hints: Mapping[str, Any], before: Sequence[Given], after: Sequence[Given]
) -> str:
    """Return the error of an option that comes before its class, if the class has no default; otherwise empty."""
    known, later = ({each.name for each in options} for options in (before, after))
    for owner in _parents(option.name):
        is_late = owner in later - known and parser.get_defaults().get(owner) is None
        if is_late and class_names(hints.get(owner)):
            return _class_comes_first(option.name, owner, hints)
    return ""


def _class_comes_first(name: str, owner: str, hints: Mapping[str, Any]) -> str:
    names = ", ".join(class_names(hints[owner]))
    return f"{name}: give the class before its options, as in --{owner} CLASS --{name} VALUE; choose one of {names}"


def _value_problem(name: str, value: Any, hint: Any, is_class_path: bool = False) -> str:
    if hint is None or fits(hint, {"class_path": value} if is_class_path else value):
        return ""
    shown, names = _shown(value), class_names(hint)
    if names:
        given = str(value).rpartition(".")[2]
        if given in names and given in _UNUSABLE:
            return f"{name} {shown}: cannot be used: {_UNUSABLE[given]}"
        if given in names:
            return ""  # the class is right, but one of its arguments is wrong
        near = difflib.get_close_matches(given, names, n=1, cutoff=0.6)
        listed = ", ".join(names[:_MAX_CHOICES]) + (", ..." if len(names) > _MAX_CHOICES else "")
        advice = f"did you mean {near[0]}? " if near else ""
        return f"{name} {shown}: no such class; {advice}choose one of {listed}, or give the full path of your own class"
    types = list(_types_in(hint))
    literals = [
        str(each) for item in types if typing.get_origin(item) is typing.Literal for each in typing.get_args(item)
    ]
    if literals and not any(typing.get_origin(item) is list or item in (int, float) for item in types):
        return f"{name} {shown}: choose one of {', '.join(literals)}"
    read = _loaded(value)
    values = read if isinstance(read, list) else [read]
    words = _YAML_WORDS if str in types and any(isinstance(each, bool) for each in values) else ""
    return f"{name} {shown}: expected {describe_type(hint)}{words}"


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


def _chosen_classes(
    parser: ArgumentParser, given: Sequence[Given], hints: Mapping[str, Any]
) -> dict[str, tuple[type, set[str]]]:
    """Return class and given arguments of each option that takes a class; the default class if none is given."""
    found: dict[str, tuple[type, set[str]]] = {}
    for option in given:
        kinds = _classes(hints.get(option.name))
        value = option.value
        if kinds and isinstance(value, str) and value:
            kind = _by_path(kinds, value)
            if kind is not None:
                found[option.name] = (kind, set())
    for option in given:
        for owner in _parents(option.name):
            kinds = _classes(hints.get(owner))
            if owner not in found and kinds:
                default = parser.get_defaults().get(owner)
                path = default.get("class_path") if hasattr(default, "get") else None
                kind = _by_path(kinds, str(path))
                if kind is not None:
                    found[owner] = (kind, set())
            if owner in found:
                found[owner][1].add(option.name.removeprefix(f"{owner}.").partition(".")[0])
    return found


def _by_path(kinds: Mapping[str, type], path: str) -> type | None:
    """Return the class of a path or a name; a path is exact if several packages have a class of that name."""
    kind = kinds.get(path.rpartition(".")[2])
    return kind if kind is None else _imported(path) or kind


def _takes(hint: Any, kind: type, argument: str) -> bool:
    """Whether slzo passes an argument itself when it calls the chosen class, such as an optimizer's parameters."""
    return (
        any(
            typing.get_origin(item) in (Callable, typing.Callable, typing.get_origin(Callable[..., Any]))
            for item in _types_in(hint, into_callables=False)
        )
        and argument in list(inspect.signature(kind).parameters)[:1]
    )


def _classes(hint: Any) -> dict[str, type]:
    found: dict[str, type] = {}
    for item in _types_in(hint):
        is_class = inspect.isclass(item) and not typing.get_origin(item) and not _is_tensor(item)
        if is_class and item.__module__ not in ("builtins", "pathlib", "datetime"):
            for kind in _subclasses(item):
                found.setdefault(kind.__name__, kind)  # torch comes before other packages with the same name
    return found


def _is_tensor(hint: Any) -> bool:
    """Whether a type is torch's tensor, which no option takes; works without loading torch."""
    return getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") == "Tensor"


def _subclasses(base: type) -> Iterator[type]:
    children: list[type] = base.__subclasses__()
    for child in children:
        if not child.__name__.startswith("_") and not inspect.isabstract(child):
            yield child
        yield from _subclasses(child)


def _types_in(hint: Any, into_callables: bool = True) -> Iterator[Any]:
    """Yield a type hint and all hints inside it; for a callable only its return type."""
    yield hint
    origin, inner = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.get_origin(Callable[..., Any]):
        inner = inner[-1:] if into_callables else ()
    if origin is not typing.Literal:
        for item in inner:
            yield from _types_in(item, into_callables)


def _flat(config: Mapping[str, Any], before: str = "") -> Iterator[Given]:
    """Yield the options of a nested mapping; a class comes as its path, followed by its arguments."""
    for key, value in sorted(config.items(), key=lambda item: item[0] != "class_path"):
        name = _plain_name(f"{before}.{key}" if before else str(key))
        if key == "class_path":
            yield Given(before, value, True)
        elif key in ("init_args", "dict_kwargs") and isinstance(value, Mapping):
            yield from _flat(value, before)
        elif isinstance(value, Mapping) and value:
            yield from _flat(value, name)
        else:
            yield Given(name, value)


def _parents(name: str) -> list[str]:
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _plain_name(name: str) -> str:
    return name.replace(".init_args.", ".").removesuffix(".class_path")


def _mapping(value: str) -> dict[str, Any] | None:
    content = _loaded(value) if value.lstrip().startswith("{") else None
    return content if isinstance(content, dict) and all(isinstance(key, str) for key in content) else None


def _loaded(value: Any) -> Any:
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return None


def _shown(value: Any) -> str:
    return "null" if value is None else repr(value) if isinstance(value, str | list | dict) else f"'{value}'"
