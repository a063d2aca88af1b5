"""``lr: auto`` in options and configs: optimizers of torch take numbers only, so the parser sees one that stands for it."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from slzo.zo.optim import AUTO_LR

_AUTO = "auto"
_LR = ("--model.optimizer.lr", "--model.optimizer.init_args.lr")
_CONFIGS = ("-c", "--config")
_OPTIMIZER = ("--model.optimizer", "--model")
_NUMBER = ".inf"


def with_numbers(args: Sequence[str]) -> list[str]:
    """Options in which ``auto`` as an optimizer's learning rate is a number, in the text of configs too."""
    found = list(args)
    for place, arg in enumerate(args):
        name, given, value = arg.partition("=")
        if not given:
            place, value = place + 1, next(iter(args[place + 1 : place + 2]), "")
        before = name + given if given else ""
        if name in _LR and value == _AUTO:
            found[place] = before + _NUMBER
        elif name in (*_CONFIGS, *_OPTIMIZER) and value:
            text = read_config(value) if name in _CONFIGS else None
            text = value if text is None else text
            content = _loaded(text) if _AUTO in text else None
            if content is not None and _replace(content, name):
                found[place] = before + yaml.safe_dump(content)
    return found


def read_config(value: str) -> str | None:
    """The text of a config file; ``None`` if there is no such file: the parser takes the text of a config too."""
    try:
        return Path(value).read_text(encoding="utf-8", errors="replace") if Path(value).is_file() else None
    except OSError:  # too long for a name
        return None


def with_words(dumped: str) -> str:
    """A dumped config in which the number is ``auto`` again."""
    return re.sub(rf"^(\s*lr): {re.escape(_NUMBER)}$", rf"\1: {_AUTO}", dumped, flags=re.MULTILINE)


def _loaded(text: str) -> dict[str, Any] | None:
    try:
        content = yaml.safe_load(text)
    except yaml.YAMLError:  # the parser says what is wrong with it
        return None
    return content if isinstance(content, dict) else None


def _replace(content: dict[str, Any], name: str) -> bool:
    """Put the number in the place of ``auto``; whether there was one."""
    path: list[str] = {"--model.optimizer": [], "--model": ["optimizer"]}.get(name, ["model", "optimizer"])
    for key in path:
        inner = content.get(key)
        if not isinstance(inner, dict):
            return False
        content = inner
    for place in (content, content.get("init_args")):
        if isinstance(place, dict) and place.get("lr") == _AUTO:
            place["lr"] = AUTO_LR
            return True
    return False
