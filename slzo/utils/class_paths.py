"""Import class paths, also from the current folder, and describe errors in one line."""

import importlib
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any


def import_failure(path: str, only_module: bool = False) -> str:
    """Return why a class path, or only its module, cannot be imported; empty if it can."""
    module, _, name = path.rpartition(".")
    try:
        found = hasattr(importlib.import_module(module), name) or only_module
    except (Exception, SystemExit) as error:  # the user's file may raise anything
        outer = module.partition(".")[0]
        gone = isinstance(error, ModuleNotFoundError) and error.name == outer
        advice = f"; install it, or give the command in the folder that has {outer}.py" if gone else ""
        return f"{module} cannot be imported ({format_error(error)}){format_place(error)}{advice}"
    return "" if found else f"{module} has no {name}; correct the name, also in the config of an earlier run"


def is_function(path: str) -> bool:
    """Return whether a path that can be imported is that of a function."""
    module, _, name = path.rpartition(".")
    return inspect.isfunction(getattr(importlib.import_module(module), name, None))


def format_error(error: BaseException) -> str:
    """Return class and message of an error, on one line; the class alone if there is no message."""
    try:
        message = error.msg if isinstance(error, SyntaxError) else str(error)
    except Exception:  # an error of the user's own class
        message = "no message"
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}".removesuffix(": ")


def raised(error: BaseException) -> str:
    """Return what the user's code raised and where, on one line."""
    return f"raised {format_error(error)}{format_place(error)}"


def format_place(error: BaseException) -> str:
    """Return the place of an error in an imported file, as ``, line 3 of FILE``; empty if there is none."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f", line {error.lineno} of {_short(error.filename)}"
    # the user's files, and module-level code of installed packages
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if (frame.name == "<module>" or "site-packages" not in frame.filename)
        and not frame.filename.startswith("<")
        and not _is_internal(frame.filename)
    ]
    return f", line {frames[-1].lineno} of {_short(frames[-1].filename)}" if frames else ""


def required_arguments(kind: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a class or function that have no default."""
    named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(kind).parameters.values()
    return [each.name for each in parameters if each.kind in named and each.default is each.empty]


def _is_internal(file: str) -> bool:
    """Whether a file belongs to this package or to Python's import system."""
    return Path(__file__).parents[1] in Path(file).parents or Path(file).parent == Path(importlib.__file__).parent


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
