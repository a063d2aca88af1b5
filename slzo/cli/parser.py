"""Parsers of commands, with one-line errors and short help."""

import os
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from slzo.cli.config_files import read_config_file
from slzo.cli.diagnose import explain
from slzo.cli.given import given_options, loaded, option_values
from slzo.cli.help import HELP_ALL, HelpAll, lightnings, short_help
from slzo.cli.shipped_configs import shipped_configs
from slzo.commands.registry import Command
from slzo.utils.errors import SlzoError
from slzo.utils.settings import Given


class CommandParser(ArgumentParser):
    """Parser of a command's options; it reports an error in one line instead of printing the usage."""

    command: Command
    own: Sequence[str]
    """Names of the command's own options."""
    given: Sequence[Given] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SlzoError that names the option, its value and what is allowed."""
        if not hasattr(self, "command"):  # the parser of a class's arguments: the command's parser reports the error
            super().error(message, ex)
        raise SlzoError(explain(self, self.command.name, self.given, message)) from ex

    def format_help(self) -> str:  # type: ignore[override]
        """Return the short help of a command, or the full help of a class."""
        return short_help(self, self.command) if hasattr(self, "command") else str(super().format_help())

    def format_all(self) -> str:
        """Return the help of every option: the command's own first, the trainer's last."""
        self.usage = f"slzo {self.command.name} [--config FILE] [--OPTION VALUE ...]"
        return str(super().format_help())


def command_function(command: Command) -> Callable[..., None]:
    """Return the function that runs a command."""
    function: Callable[..., None] = getattr(import_module(f"slzo.commands.{command.name}"), command.name)
    return function


def add_command_arguments(parser: CommandParser, command: Command) -> None:
    """Add ``--help_all`` and the command's own options to its parser."""
    parser.command = command
    parser.add_argument(HELP_ALL, action=HelpAll, help=f"List every option with its type{lightnings(command)}.")
    function = command_function(command)
    parser.own = parser.add_function_arguments(function, as_group=False, as_positional=False, skip={"app"})


def plain_parser(command: Command) -> CommandParser:
    """Return the parser of a command without the options of trainer, model and data."""
    parser = CommandParser(description=command.help, allow_abbrev=False)
    parser.add_argument("-c", "--config", action="config", help="Options in a YAML file.")
    add_command_arguments(parser, command)
    return parser


def read_given(words: Sequence[str]) -> list[Given]:
    """Return the options on the command line and in its config files.

    Raises:
        SlzoError: A config file does not exist or cannot be used.
    """
    configs: list[Mapping[str, Any]] = []
    for value in option_values(words, "--config"):
        if not value:
            raise SlzoError("--config: is empty; give a YAML file")
        if os.path.exists(value):  # noqa: PTH110  a text that is too long for a path does not exist
            configs.append(read_config_file(Path(value)))
        elif ":" not in value:  # a config given as text contains a colon
            names = ", ".join(shipped_configs())
            raise SlzoError(
                f"--config {value!r}: no such file; check the path, or give one of slzo's own configs: {names}"
            )
        else:
            content = loaded(value)
            configs.append(content if isinstance(content, dict) else {})
    return given_options(words, configs)
