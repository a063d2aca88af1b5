"""Parsers of commands, with one-line errors and short help."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from jsonargparse import ArgumentParser

from slzo.cli.config_files import check_config_file
from slzo.cli.diagnose import explain
from slzo.cli.given import Given, given_options, option_words
from slzo.cli.help import add_help_all, short_help
from slzo.cli.shipped_configs import CONFIG_OPTIONS, shipped_configs
from slzo.commands.registry import Command
from slzo.utils.errors import SlzoError


class CommandParser(ArgumentParser):
    """Parser of a command's options; it reports an error in one line instead of printing the usage."""

    command: Command
    given: Sequence[Given] = ()

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        """Raise a SlzoError that names the option, its value and what is allowed."""
        if not hasattr(self, "command"):  # the parser of a class's arguments: the command's parser reports the error
            super().error(message, ex)
        raise SlzoError(explain(self, self.command.name, self.given, message)) from ex

    def format_help(self) -> str:  # type: ignore[override]
        """Return the short help of a command, or the full help of a class."""
        command = getattr(self, "command", None)
        if command is None:
            return str(super().format_help())
        return short_help(self, command)

    def format_all(self) -> str:
        """Return the help of every option: the command's own first, the trainer's last."""
        self.usage = f"slzo {self.command.name} [--config FILE] [--OPTION VALUE ...]"
        return str(super().format_help())


def command_function(command: Command) -> Callable[..., None]:
    """Return the function that runs a command."""
    function: Callable[..., None] = getattr(import_module(f"slzo.commands.{command.name}"), command.name)
    return function


def command_arguments(command: Command) -> list[str]:
    """Return the names of a command's own options."""
    return [name for name in inspect.signature(command_function(command)).parameters if name != "app"]


def add_command_arguments(parser: CommandParser, command: Command) -> None:
    """Add ``--help_all`` and the command's own options to its parser."""
    parser.command = command
    add_help_all(parser, command)
    parser.add_function_arguments(command_function(command), as_group=False, as_positional=False, skip={"app"})


def plain_parser(command: Command) -> CommandParser:
    """Return the parser of a command without the options of trainer, model and data."""
    parser = CommandParser(description=command.help, allow_abbrev=False)
    parser.add_argument(*CONFIG_OPTIONS, action="config", help="Options in a YAML file.")
    add_command_arguments(parser, command)
    return parser


def option_values(args: Sequence[str], *names: str) -> list[str]:
    """Return the values of some options on the command line."""
    return [value for name, value, _, _ in option_words(args) if name in names]


def read_given(args: Sequence[str]) -> list[Given]:
    """Return the options on the command line and in its config files.

    Raises:
        SlzoError: A config file does not exist or cannot be used.
    """
    configs: list[Mapping[str, Any]] = []
    for value in option_values(args, *CONFIG_OPTIONS):
        if not value:
            raise SlzoError("--config: is empty; give a YAML file")
        path = Path(value)
        if exists(path):
            configs.append(check_config_file(path))
        elif ":" not in value:  # a config given as text contains a colon
            names = ", ".join(shipped_configs())
            raise SlzoError(
                f"--config {value!r}: no such file; check the path, or give one of slzo's own configs: {names}"
            )
    return given_options(args, configs)


def exists(path: Path) -> bool:
    """Whether a path exists; a text that cannot be a path does not."""
    try:
        return path.exists()
    except (OSError, ValueError):  # a config given as text can be too long for a path
        return False
