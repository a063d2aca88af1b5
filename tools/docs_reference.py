"""A hook of mkdocs that generates the reference of options and of the Python API from the code."""

import inspect
from argparse import SUPPRESS, Action
from collections.abc import Callable
from typing import Any

from jsonargparse import Namespace
from mkdocs.structure.files import File, Files

from command_parsers import parser_of
from slzo.callbacks.defaults import DEFAULTS
from slzo.commands.registry import COMMANDS
from slzo.datamodule import TaskDataModule
from slzo.export.write import export_checkpoint
from slzo.lightning.trainer import ZOTrainer
from slzo.module import ZOModule
from slzo.private.parsers import options_of
from slzo.zo import ClosureLoss, EstimatorContext, TunedTensors, take_step

_GROUPS = ("model", "data", *DEFAULTS)
_TRAINER = (ZOTrainer.fit, ZOTrainer.validate, ZOTrainer.test, ZOTrainer.predict)
_CORE = (take_step, EstimatorContext, ClosureLoss, TunedTensors)
_PUBLIC = (ZOTrainer, *_TRAINER, ZOModule, TaskDataModule, export_checkpoint, *_CORE)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in (("options.md", options_page()), ("python.md", python_page())):
        files.append(File.generated(config, name, content=text))
    return files


def options_page() -> str:
    """Return the page of all commands, and of slzo's options with their defaults."""
    options = [action for action in options_of(parser_of(COMMANDS["fit"])) if _is_option(action)]
    lines = [
        "# Options",
        "",
        "The options of Lightning are those of its Trainer; `slzo fit --help_all` lists them.",
        "",
    ]
    lines += ["| command | what it does |", "|---|---|"]
    lines += [f"| `slzo {command.name}` | {_cell(command.help)} |" for command in COMMANDS.values()]
    for group in _GROUPS:
        lines += ["", f"## {group}", "", "| option | default | |", "|---|---|---|"]
        for action in options:
            if action.dest.startswith(f"{group}."):
                lines.append(f"| `{action.dest}` | {_default(action.default)} | {_cell(action.help or '')} |")
    return "\n".join(lines) + "\n"


def _is_option(action: Action) -> bool:
    """Whether the action is an option with a value, not a group of options or the help of a class."""
    name = action.option_strings[0] if action.option_strings else ""
    return (
        name.startswith("--") and not name.endswith(".help") and action.help != SUPPRESS and action.dest not in _PARTS
    )


_PARTS = frozenset({"model.engine"})
"""Groups that are inside other groups."""


def _default(value: Any) -> str:
    if value is None or value == SUPPRESS:
        return ""
    if isinstance(value, Namespace | dict) and "class_path" in value:
        value = value["class_path"].rpartition(".")[2]
    return f"`{_cell(str(value))}`"


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def python_page() -> str:
    """Return the page of signatures and docstrings of the Python API."""
    lines = ["# Python", "", "A `ZOTrainer` runs in the same way as `slzo fit`.", ""]
    for thing in _PUBLIC:
        level = "###" if thing in _TRAINER else "##"
        place = [] if thing in _TRAINER else [f"`{thing.__module__}.{thing.__qualname__}`", ""]
        lines += [f"{level} {thing.__qualname__}", "", *place, *_documented(thing)]
    return "\n".join(lines) + "\n"


def _documented(thing: Callable[..., Any]) -> list[str]:
    name = thing.__name__
    parameters = [str(parameter) for parameter in inspect.signature(thing).parameters.values()]
    signature = f"{name}(\n    " + ",\n    ".join(parameters) + "\n)" if parameters else f"{name}()"
    return ["```python", signature, "```", "", "```text", inspect.getdoc(thing) or "", "```", ""]
