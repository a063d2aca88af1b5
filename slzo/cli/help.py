"""``--help`` lists the command's own options, then slzo's, one line each; ``--help_all`` also lists Lightning's."""

import argparse
import re
import shutil
import sys
import textwrap
from collections.abc import Iterator, Sequence
from typing import Any

from jsonargparse import ArgumentParser

from slzo.commands.registry import Command
from slzo.private.parsers import options_of
from slzo.utils.config_code import GROUPS

HELP_ALL = "--help_all"

_SHOWN = {
    "trainer": [
        "max_steps",
        "max_epochs",
        "max_time",
        "val_check_interval",
        "devices",
        "accelerator",
        "strategy",
        "logger",
    ],
    "checkpoint": ["monitor", "mode", "save_top_k", "filename"],
}
"""Options of Lightning's classes that are often set; the short help leaves out the others."""

_TEXTS = {
    "config": "YAML file with options, or one of slzo's own by name, such as quickstart; several are read in order.",
    "seed_everything": "Seed of rows and directions.",
    "trainer.accelerator": "cpu, gpu, auto and others.",
    "trainer.strategy": "auto, ddp, sharded and others.",
    "trainer.logger": "TensorBoardLogger, CSVLogger, WandbLogger, MLFlowLogger or others, or false.",
    "trainer.max_time": "Time limit of the whole fit, DD:HH:MM:SS; the number of steps is planned for it.",
    "trainer.val_check_interval": "Steps between two validations.",
}
"""Short help texts that replace those of the classes."""

_COMMON = ("config", "ckpt_path", "seed_everything")
_COLUMN = 38


class HelpAll(argparse.Action):
    """Prints every option, including Lightning's, and exits."""

    def __init__(self, option_strings: Sequence[str], dest: str = argparse.SUPPRESS, **kwargs: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, nargs=0, default=argparse.SUPPRESS, help=kwargs.get("help"))

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Print the help."""
        sys.stdout.write(parser.format_all())
        parser.exit()


def short_help(parser: ArgumentParser, command: Command) -> str:
    """Return the short help of a command."""
    width = max(60, min(120, shutil.get_terminal_size((110, 24)).columns))
    actions = [action for action in options_of(parser) if _is_option(action)]
    blocks = [f"usage: slzo {command.name} [--config FILE] [--OPTION VALUE ...]", parser.description or ""]
    blocks += _block("options", _own(actions), "", width)
    for group, title in GROUPS.items() if command.has_app else ():
        chosen = [action for action in actions if _is_shown(action.dest, group)]
        blocks += _block(f"{group}: {title}", chosen, f"{group}.", width)
    classes = "; --model.scope.help LoRA lists the options of a class" if command.has_app else ""
    blocks.append(f"slzo {command.name} {HELP_ALL} lists every option with its type{lightnings(command)}{classes}.")
    return "\n\n".join(block for block in blocks if block) + "\n"


def lightnings(command: Command) -> str:
    """Return what ``--help_all`` adds to the help of a command."""
    return ", including Lightning's" if command.has_app else ""


def _own(actions: Sequence[argparse.Action]) -> list[argparse.Action]:
    """Return the command's own options: required ones, then optional ones, then those of every command."""
    others = (*GROUPS, "help", "print_config", argparse.SUPPRESS)
    own = [action for action in actions if "." not in action.dest and action.dest not in others]
    return sorted(own, key=lambda action: (action.dest in _COMMON, not action.required))


def _is_option(action: argparse.Action) -> bool:
    """Whether a user can give the option; the help of a class and linked options do not count."""
    name = action.option_strings[0] if action.option_strings else ""
    return action.help != argparse.SUPPRESS and name.startswith("-") and not name.endswith(".help")


def _is_shown(dest: str, group: str) -> bool:
    """Whether the short help lists an option in this group; options of inner groups are listed there."""
    innermost = max((each for each in GROUPS if dest.startswith(f"{each}.")), key=len, default="")
    name = dest.removeprefix(f"{group}.")
    return innermost == group and dest not in GROUPS and name in _SHOWN.get(group, (name,))


def _block(title: str, actions: Sequence[argparse.Action], prefix: str, width: int) -> Iterator[str]:
    lines = [line for action in actions if (line := _line(action, prefix, width))]
    if lines:
        yield "\n".join([f"{title}:", *lines])


def _line(action: argparse.Action, prefix: str, width: int) -> str:
    option = next(name for name in action.option_strings if name.startswith("--") and not name.endswith("+"))
    text = _first_sentence(_TEXTS.get(action.dest, action.help or ""))
    default = _default(action)
    if prefix:
        text = re.split(r"; (?![^()]*\))", text)[0]
    elif default:
        text = text.split("; by default ")[0]
    text = f"{text} {default}".strip()
    start, indent = f"  {option}", " " * _COLUMN
    column = textwrap.fill(text, width, initial_indent=indent, subsequent_indent=indent)
    return f"{start}{column[len(start) :]}" if len(start) < _COLUMN else f"{start}\n{column}"


def _first_sentence(text: str) -> str:
    plain = " ".join(text.replace("``", "").split())
    found = re.match(r"(.+?[^.][.])(?:\s+[A-Z\"(]|$)", plain)
    return (found[1] if found else plain).rstrip(".:;")


def _default(action: argparse.Action) -> str:
    """Return the default in brackets; one that depends on other options stands in the help after "by default"."""
    if action.required:
        return "(required)"
    value = action.default
    if isinstance(value, str | int | float) and value != argparse.SUPPRESS:
        return f"[{str(value).lower() if isinstance(value, bool) else value}]"
    described = re.search(r"\bby default (?!\()([^;]+?)[.;](?:\s|$)", action.help or "")
    return "" if described is None else f"[{' '.join(described[1].replace('``', '').split())}]"
