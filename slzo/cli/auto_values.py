"""Replaces words in options and configs that the parser would misread.

``lr: auto`` becomes a special number, because torch's optimizers take only numbers. ``SGD`` and other names of torch's optimizers
become class paths, because another loaded package may have a class of the same name. Options that only other LightningCLIs have
are left out if they are null. A prompt such as ``Review: {text}``, which would be read as a mapping, is passed
in quotes.
"""

import re
import textwrap
from collections.abc import Sequence
from contextlib import suppress
from enum import Enum
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import get_loader

from slzo.zo.optim import AUTO_LR

_AUTO = "auto"
_NUMBER = ".inf"
_RATES = ("model.optimizer.lr", "model.optimizer.init_args.lr")
_CLASSES = ("model.optimizer", "model.optimizer.class_path")
_FILES = ("config", "model", "model.optimizer")
_TASK = "data.task.init_args"
_TEXTS = ("prompt", "system")  # of tasks
_UNUSED = ("optimizer", "lr_scheduler", "weights_only")  # null in configs that other LightningCLIs have saved


class _Dumper(yaml.SafeDumper):
    """Keeps the quotes of texts such as "12e5", which are numbers for jsonargparse, though not for PyYAML."""


_Dumper.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"[-+]?[0-9][0-9_]*(\.[0-9_]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)

# as in the default of an argument whose type is str
_Dumper.add_multi_representer(Enum, lambda dumper, member: dumper.represent_data(member.value))


def as_yaml(value: Any) -> str:
    """Return a value as YAML that the parser reads as the same value."""
    return str(yaml.dump(value, Dumper=_Dumper, allow_unicode=True, sort_keys=False))


def with_value(dumped: str, mark: str, value: Any) -> str:
    """Return a dumped config with a list or mapping in place of the text ``mark``."""

    def block(found: re.Match[str]) -> str:
        return f"{found[1]}{found[2]}:\n{textwrap.indent(as_yaml(value).rstrip(), found[1] + '  ')}"

    return re.sub(rf"^( *)(\w+): {re.escape(mark)}$", block, dumped, flags=re.MULTILINE)


def encode_words(words: Sequence[str]) -> list[str]:
    """Return options with a number for the learning rate ``auto`` and class paths of torch's optimizers, also inside configs.

    A text of a task that YAML reads as a mapping or a list is passed inside a mapping, in quotes.
    """
    found = []
    for word in words:
        name, _, value = word.partition("=")
        option = name.removeprefix("--")
        task, _, argument = option.rpartition(".")
        if task in ("data.task", _TASK) and argument in _TEXTS and _is_nested(value):
            found.append(f"--{_TASK}={as_yaml({argument: value})}")
            continue
        text = _text(_spelled(value, option))
        found.append(word if text == value else f"{name}={text}")
    return found


def _is_nested(value: str) -> bool:
    """Whether YAML reads a text as a mapping or a list."""
    try:
        return isinstance(get_loader("yaml")(value), dict | list)
    except yaml.YAMLError:
        return False


def decode_words(dumped: str) -> str:
    """Return a dumped config with ``auto`` in place of the number."""
    return re.sub(rf"^(\s*lr): {re.escape(_NUMBER)}$", rf"\1: {_AUTO}", dumped, flags=re.MULTILINE)


def _text(value: Any) -> str:
    """Return the value of an option as the parser reads it."""
    if isinstance(value, dict):
        return as_yaml(value)
    return _NUMBER if value == AUTO_LR else str(value)


def _spelled(value: Any, name: str) -> Any:
    """Return the value of an option with its words replaced; a file stays a path if there are none in it."""
    content = _loaded(value) if name in _FILES and isinstance(value, str) else value
    if isinstance(content, dict):
        new = {
            key: inner if key == "config" else _spelled(inner, f"{name}.{key}".removeprefix("config."))
            for key, inner in content.items()
            if not (name == "config" and key in _UNUSED and inner is None)
        }
        return value if new == content else new
    if name in _RATES and value == _AUTO:
        return AUTO_LR
    return _full_name(value) if name in _CLASSES and isinstance(value, str) else value


def _loaded(value: str) -> dict[str, Any] | None:
    """Return the options of a config file or text; ``None`` if there are none."""
    path, text = Path(value), None
    with suppress(OSError):  # a text that is too long for a file name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    try:
        content = get_loader("yaml")(value if text is None else text)
    except yaml.YAMLError:  # the parser reports the error
        return None
    if not isinstance(content, dict):
        return None
    return content if text is None else _with_paths(content, path.parent)


def _with_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of a config, with the paths of files that they name relative to the current folder."""
    found = dict(content)
    for name, value in content.items():
        if isinstance(value, dict):
            found[name] = _with_paths(value, folder)
        elif isinstance(value, str) and value.endswith((".yaml", ".yml")) and (folder / value).is_file():
            found[name] = str(folder / value)
    return found


def _full_name(name: str) -> str:
    """Return the class path of a torch optimizer given by its name; return other names unchanged."""
    kind = getattr(torch.optim, name, None)
    known = isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)
    return f"torch.optim.{name}" if known else name
