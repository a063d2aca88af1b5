"""The options as they were given, on the command line and in configs."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import yaml

from slzo.utils.settings import Given, options_in, plain_name

_FLAGS = ("--help", "--help_all", "--print_config")
_OPTION = re.compile("--|-[A-Za-z]")  # -1 is a value


def one_word_each(args: Sequence[str]) -> list[str]:
    """Return a command line in which each option is one word, ``--NAME=VALUE``, as the other functions of ``cli`` read it."""
    words: list[str] = []
    for arg in args:
        if arg.partition("=")[0] == "-c":
            arg = f"--config{arg[2:]}"
        last = words[-1] if words else ""
        takes_value = last.startswith("--") and "=" not in last and last not in _FLAGS
        if takes_value and (not _OPTION.match(arg) or arg in ("-inf", "-nan")):
            words[-1] = f"{last}={arg}"
        else:
            words.append(arg)
    # the parser prints the config of the options so far
    return sorted(words, key=lambda word: word.partition("=")[0] == "--print_config")


def given_options(words: Sequence[str], configs: Sequence[Mapping[str, Any]]) -> list[Given]:
    """Return the options in the order in which the parser reads them; repeated options are all kept.

    Args:
        words: The command line, see :func:`one_word_each`.
        configs: Contents of the configs that it names, in this order.
    """
    found: list[Given] = []
    unread = iter(configs)
    for word in words:
        name, _, value = word.removeprefix("--").partition("=")
        if not word.startswith("--"):
            continue
        if name == "config":
            found += options_in(next(unread))
            continue
        content, plain = _mapping(value), plain_name(name.removesuffix("+"))
        found += options_in(content, plain) if content else [Given(plain, value, name.endswith(".class_path"))]
    return found


def option_values(words: Sequence[str], *names: str) -> list[str]:
    """Return the values of some options on the command line."""
    pairs = (word.partition("=") for word in words)
    return [value for name, _, value in pairs if name in names]


def parents(name: str) -> list[str]:
    """Return the options and groups that contain an option, the innermost first."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(len(parts) - 1, 0, -1)]


def _mapping(value: str) -> dict[str, Any] | None:
    content = loaded(value) if value.lstrip().startswith("{") else None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        return None
    return content if any(inner is not None for inner in content.values()) else None  # a prompt such as {text}


def loaded(value: Any) -> Any:
    """Return a value as YAML reads it; ``None`` if it cannot."""
    try:
        return yaml.safe_load(value) if isinstance(value, str) else value
    except yaml.YAMLError:
        return None
