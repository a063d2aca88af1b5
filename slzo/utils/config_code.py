"""Find what a config would run that did not come with slzo, without importing any of it."""

import inspect
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from typing import Any

CODE_OPTIONS = frozenset(
    {
        "model.scope",
        "model.estimator",
        "model.optimizer",
        "model.lr_scheduler",
        "model.quantization",
        "data.task",
        "data.objective",
        "data.reward",
        "profiler.rule",
        "trainer.accelerator",
        "trainer.strategy",
        "trainer.logger",
        "trainer.callbacks",
        "trainer.plugins",
        "trainer.profiler",
    }
)
"""The options that take a class, a function, or the name of one."""
GROUPS: Mapping[str, str] = {
    "trainer": "length, validations, devices",
    "model": "what is tuned and how",
    "data": "task, rows, batches",
    "profiler": "how the layer is found",
    "checkpoint": "which state is the best",
    "last_checkpoint": "the state to continue from",
    "guard": "rolls back when the dev loss spikes",
    "watch": "warns of steps that make no progress",
    "record": "scores before and after, files of the run",
    "answers": "generated answers in TensorBoard",
    "model.engine": "speed and memory",
}
"""The groups of options with their titles, in the order of the help; a string instead of a group is the path of another file."""
TRUST = "trust_remote_code"

_PACKAGES = (
    "slzo",
    "torch.optim",
    *(f"lightning.pytorch.{name}" for name in ("callbacks", "loggers", "profilers", "strategies")),
)
_QUANTIZATION = re.compile(r"(transformers\.)?[A-Z]\w*Config")
_REWARDS = ("data.reward", "data.objective.functions")
_WORD = re.compile(r"([a-z0-9][a-z0-9_-]*)?|ChatTask")  # a name that slzo or Lightning knows, such as sst2 or ddp
_NAME = re.compile(r"[A-Za-z_]\w*")
_CONTAINERS = (typing.Union, types.UnionType, list, tuple, dict)
_PLAIN = (int, float, str, bool, type(None), Path, timedelta)


def code_in(config: Mapping[Any, Any], folders: Sequence[Path]) -> list[str]:
    """Return the entries of a config that run code other than that of slzo, torch and Lightning, as ``option 'value'``.

    This is a list of what is known to be harmless: classes of these packages whose arguments are plain values, and short names.
    Everything else is returned, such as paths of other files and options in an unusual form.

    Args:
        config: The config as YAML reads it.
        folders: Folders in which the parser looks for a file of an option's value.
    """
    found = [f"{name} {_shown(value)}" for name, value in _entries(config, "", tuple(folders))]
    return list(dict.fromkeys(found))


def _entries(value: Any, name: str, folders: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    if not name or name in GROUPS:
        if not isinstance(value, Mapping):
            if value is not None:
                yield name, value
            return
        for key, inner in value.items():
            place = f"{name}.{key}" if name else str(key)
            if not isinstance(key, str) or not _NAME.fullmatch(key) or place == "config":
                yield place, inner
            else:
                yield from _entries(inner, place, folders)
    elif name.endswith(f".{TRUST}"):
        if value is not False:
            yield name, value
    elif name in CODE_OPTIONS:
        yield from _code(value, name, folders)
    elif isinstance(value, Mapping | list):
        yield from _classes(value, name)


def _code(value: Any, name: str, folders: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    """Yield what the value of an option that takes classes or functions would run."""
    if isinstance(value, str):
        if not _WORD.fullmatch(value) or any((folder / value).is_file() for folder in folders):
            yield name, value
    elif isinstance(value, list):
        for each in value:
            yield from _code(each, name, folders)
    elif isinstance(value, Mapping):
        if "class_path" in value:
            yield from _class(value, name, folders)
        elif name in _REWARDS and "function" in value:
            yield from _code(value["function"], name, folders)
            yield from _classes(value.get("arguments"), name)
        else:
            for inner in value.values():
                yield from _code(inner, name, folders)
    elif not isinstance(value, int | float | None):
        yield name, value


def _class(value: Mapping[Any, Any], name: str, folders: tuple[Path, ...]) -> Iterator[tuple[str, Any]]:
    """Yield the class if it is not from the packages, otherwise what its arguments would run."""
    path, arguments = value["class_path"], value.get("init_args")
    hints = _hints(path, name) if isinstance(path, str) else None
    if hints is None or not isinstance(arguments, Mapping | None):
        yield name, path
        return
    for key, inner in (arguments or {}).items():
        place = f"{name}.{key}"
        if place not in _REWARDS and _is_plain(hints.get(key)):
            yield from _classes(inner, place)
        else:
            yield from _code(inner, place, folders)
    for key, inner in value.items():
        if key not in ("class_path", "init_args"):
            yield from _code(inner, f"{name}.{key}", folders)


def _classes(value: Any, name: str) -> Iterator[tuple[str, Any]]:
    """Yield the classes in a value that should contain none."""
    if isinstance(value, list):
        for each in value:
            yield from _classes(each, name)
    elif isinstance(value, Mapping):
        if "class_path" in value:
            yield name, value["class_path"]
        for inner in value.values():
            yield from _classes(inner, name)


def _hints(path: str, name: str) -> Mapping[str, Any] | None:
    """Return the types of the arguments of a class of the packages; ``None`` for another class."""
    if name == "model.quantization":
        return {} if _QUANTIZATION.fullmatch(path) else None
    module, _, last = path.rpartition(".")
    if not _is_known(module) or not all(_NAME.fullmatch(part) for part in path.split(".")):
        return None
    try:
        kind = getattr(import_module(module), last, None)
        if not inspect.isclass(kind) or not _is_known(kind.__module__):
            return None
        return typing.get_type_hints(kind.__init__)
    except ImportError:
        return None
    except (NameError, TypeError):  # types that cannot be resolved
        return {}


def _is_known(module: str) -> bool:
    return module.startswith(tuple(f"{package}." for package in _PACKAGES)) or module in _PACKAGES


def _is_plain(hint: Any) -> bool:
    """Whether a type holds only numbers, texts and other plain values."""
    if typing.get_origin(hint) is typing.Literal:
        return True
    inner = typing.get_args(hint)
    return typing.get_origin(hint) in _CONTAINERS and all(map(_is_plain, inner)) if inner else hint in _PLAIN


def _shown(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value).lower() if isinstance(value, bool) else str(value)
