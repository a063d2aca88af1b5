"""A hook of mkdocs: the reference of options and of Python, written from the code when the site is built."""

import inspect
from collections.abc import Iterator
from typing import Any

from mkdocs.structure.files import File, Files

from slzo.cli_completion import schema
from slzo.commands import COMMANDS
from slzo.datamodule import TaskDataModule
from slzo.module import ZOModule
from slzo.run_trainer import run_trainer
from slzo.trainer import ZOTrainer
from slzo.zo import ClosureLoss, Request, TunedTensors, take_step

_OWN_GROUPS = [
    "model",
    "data",
    "profiler",
    "guard",
    "checkpoint",
    "summary",
    "samples",
    "report",
    "watch",
    "last_checkpoint",
]
_PUBLIC = (run_trainer, ZOTrainer, ZOModule, TaskDataModule, take_step, Request, ClosureLoss, TunedTensors)


def on_files(files: Files, config: Any) -> Files:
    """Add the generated pages."""
    for name, text in (("options.md", options_page()), ("python.md", python_page())):
        files.append(File.generated(config, name, content=text))
    return files


def options_page() -> str:
    """Every command, and slzo's options with their defaults."""
    found = schema("fit")["properties"]
    lines = ["# Options", "", "Lightning's own are those of its Trainer; `slzo fit --help_all` lists them.", ""]
    lines += ["| command | does |", "|---|---|"]
    lines += [f"| `slzo {command.name}` | {_cell(command.help)} |" for command in COMMANDS.values()]
    for group in _OWN_GROUPS:
        lines += ["", f"## {group}", "", "| option | default | |", "|---|---|---|"]
        for name, told in _leaves(found[group], group):
            default = f"`{_cell(str(told['default']))}`" if "default" in told else ""
            lines.append(f"| `{name}` | {default} | {_cell(told.get('description', ''))} |")
    return "\n".join(lines) + "\n"


def _leaves(place: dict[str, Any], before: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for name, told in place["properties"].items():
        if told.get("properties"):
            yield from _leaves(told, f"{before}.{name}")
        else:
            yield f"{before}.{name}", told


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;")


def python_page() -> str:
    """Signature and docstring of what is used from Python."""
    lines = ["# Python", "", "What the command line does, from Python: `run_trainer` makes a trainer as it does.", ""]
    for thing in _PUBLIC:
        lines += [f"## {thing.__name__}", "", f"`{thing.__module__}.{thing.__qualname__}`", ""]
        lines += _documented(thing)
        if thing is ZOTrainer:
            for name in COMMANDS:
                method = vars(ZOTrainer).get(name)
                if method is not None:
                    lines += [f"### ZOTrainer.{name}", "", *_documented(method)]
    return "\n".join(lines) + "\n"


def _documented(thing: Any) -> list[str]:
    name = thing.__name__
    parameters = [str(parameter) for parameter in inspect.signature(thing).parameters.values()]
    signature = f"{name}(\n    " + ",\n    ".join(parameters) + "\n)" if parameters else f"{name}()"
    return ["```python", signature, "```", "", "```text", inspect.getdoc(thing) or "", "```", ""]
