"""Class paths: importing what they name, from the current folder too, and saying in one line why that fails."""

import importlib
import inspect
import traceback
from pathlib import Path


def import_failure(path: str) -> str:
    """Why what a class path names cannot be imported; empty if it can."""
    module, _, name = path.rpartition(".")
    try:
        found = hasattr(importlib.import_module(module), name)
    except (Exception, SystemExit) as error:  # whatever the user's file raises
        return f"{module} cannot be imported ({format_error(error)}){format_place(error)}"
    return "" if found else f"{module} has no {name}"


def format_error(error: BaseException) -> str:
    """Class and message of an error, on one line."""
    message = error.msg if isinstance(error, SyntaxError) else str(error)
    return f"{type(error).__name__}: {' '.join(message.split())[:200]}"


def format_place(error: BaseException) -> str:
    """Where in a file that was being imported an error is, as ``, line 3 of FILE``; empty if in none."""
    if isinstance(error, SyntaxError) and error.filename is not None:
        return f", line {error.lineno} of {_short(error.filename)}"
    # files of the current folder, and what others run when they are imported
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.name == "<module>" or "site-packages" not in frame.filename
    ]
    own = [frame for frame in frames if not frame.filename.startswith("<") and not _is_ours(frame.filename)]
    return f", line {own[-1].lineno} of {_short(own[-1].filename)}" if own else ""


def required_arguments(kind: type) -> list[str]:
    """Names of the arguments that a class cannot be made without."""
    usual = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    parameters = inspect.signature(kind).parameters.values()
    return [
        parameter.name for parameter in parameters if parameter.kind in usual and parameter.default is parameter.empty
    ]


def _is_ours(file: str) -> bool:
    """Whether a file is of this package, or of the imports of Python."""
    return Path(__file__).parent in Path(file).parents or Path(file).parent == Path(importlib.__file__).parent


def _short(file: str) -> str:
    path = Path(file)
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else file
