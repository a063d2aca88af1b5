"""Replaces words in options and configs that the parser would misread.

``lr: auto`` becomes a special number, because torch's optimizers take only numbers. ``SGD`` and other names of torch's optimizers
become class paths, because another loaded package may have a class of the same name.
"""

import re
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
import yaml

from slzo.cli.given import option_words
from slzo.cli.shipped_configs import CONFIG_OPTIONS
from slzo.zo.optim import AUTO_LR

_AUTO = "auto"
_LR = ("--model.optimizer.lr", "--model.optimizer.init_args.lr")
_OPTIMIZER = ("--model.optimizer", "--model")
_NUMBER = ".inf"


def spelled_out(args: Sequence[str]) -> list[str]:
    """Return options with a number for the learning rate ``auto`` and class paths of torch's optimizers, also inside configs."""
    found = list(args)
    for name, value, place, before in option_words(args):
        if name in _LR and value == _AUTO:
            found[place] = before + _NUMBER
        elif name in (*CONFIG_OPTIONS, *_OPTIMIZER) and value:
            content = _loaded(value)
            if content is not None and _replace(content, name):
                found[place] = before + yaml.safe_dump(content)
            elif name == "--model.optimizer":
                found[place] = before + _full_name(value)
    return found


def with_words(dumped: str) -> str:
    """Return a dumped config with ``auto`` in place of the number."""
    return re.sub(rf"^(\s*lr): {re.escape(_NUMBER)}$", rf"\1: {_AUTO}", dumped, flags=re.MULTILINE)


def _loaded(value: str) -> dict[str, Any] | None:
    """Return the options of a config file or text; ``None`` if there are none."""
    path, text = Path(value), None
    with suppress(OSError):  # a text that is too long for a file name
        text = path.read_text(encoding="utf-8", errors="replace") if path.is_file() else None
    try:
        content = yaml.safe_load(value if text is None else text)
    except yaml.YAMLError:  # the parser reports the error
        return None
    if not isinstance(content, dict):
        return None
    return content if text is None else _with_paths(content, path.parent)


def _replace(content: dict[str, Any], name: str) -> bool:
    """Replace words in a config, or in the value of ``model`` or ``model.optimizer``; return whether anything changed."""
    path: list[str] = {"--model.optimizer": [], "--model": ["optimizer"]}.get(name, ["model", "optimizer"])
    changed = False
    for key in path:
        inner = content.get(key)
        if isinstance(inner, str) and (options := _loaded(inner)) is not None:
            content[key] = inner = options
        elif key == "optimizer" and isinstance(inner, str) and inner != _full_name(inner):
            content[key], changed = _full_name(inner), True
        if not isinstance(inner, dict):
            return changed
        content = inner
    kind = content.get("class_path")
    if isinstance(kind, str) and kind != _full_name(kind):
        content["class_path"], changed = _full_name(kind), True
    for place in (content, content.get("init_args")):
        if isinstance(place, dict) and place.get("lr") == _AUTO:
            place["lr"], changed = AUTO_LR, True
    return changed


def _with_paths(content: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Return the options of a config in which the files that they name have a path from the current folder."""
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
