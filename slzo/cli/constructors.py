"""Finds the class that cannot be made with its options, and reports its error."""

from argparse import ArgumentError
from collections.abc import Iterator, Mapping
from typing import Any

from jsonargparse import ArgumentParser, Namespace

from slzo.cli.option_types import imported_class
from slzo.utils.errors import SlzoError, one_line


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
        chosen = imported_class(path)
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
        return SlzoError(f"{name}: {one_line(error, None)}; correct it")
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
