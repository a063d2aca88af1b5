"""``lr: auto`` in options and configs: optimizers of torch take numbers only, so the parser sees one that stands for it."""

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
            is_file = name in _CONFIGS and "\n" not in value and Path(value).is_file()
            text = Path(value).read_text(encoding="utf-8", errors="replace") if is_file else value
            content = _loaded(text) if _AUTO in text else None
            if content is not None and _replace(content, name):
                found[place] = before + yaml.safe_dump(content)
    return found


def with_words(dumped: str) -> str:
    """A dumped config in which the number is ``auto`` again."""
    return dumped.replace(f"lr: {_NUMBER}", f"lr: {_AUTO}")


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
