"""Finds the class that cannot be made with its options, and reports its error."""

from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser

from slzo.cli.option_types import imported_class
from slzo.utils.class_paths import format_error, format_place
from slzo.utils.errors import SlzoError, one_line


def constructor_problem(config: Mapping[str, Any], groups: Mapping[str, type]) -> SlzoError | None:
    """Return the error of the first class that cannot be made with its options; ``None`` if each can be made.

    Args:
        config: The parsed options.
        groups: Classes whose arguments are a group of options, by name.
    """
    values = [(name, kind, config.get(name)) for name, kind in groups.items()]
    for name, kind, arguments in (*values, *_class_values(config)):
        if (error := _refusal(name, kind, arguments)) is not None:
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
        place = format_place(error)  # in a user's file
        reason = f"{format_error(error)}{place}" if place else one_line(error, None)
        return SlzoError(f"{name}: {reason}; correct it")
    return None


def _class_values(value: Any, name: str = "") -> Iterator[tuple[str, type, Any]]:
    """Yield option, class and arguments of every class in parsed options that can be imported."""
    if isinstance(value, list):
        for each in value:
            yield from _class_values(each, name)
    elif isinstance(value, Mapping):
        path = value.get("class_path")
        if isinstance(path, str) and (kind := imported_class(path)) is not None:
            yield name, kind, value.get("init_args")
        for key, inner in value.items():
            if key not in ("class_path", "init_args"):
                yield from _class_values(inner, f"{name}.{key}" if name else key)
