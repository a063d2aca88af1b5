"""The parser of each command, for pages and tests that go through the options."""

from slzo.cli.app import AppParser, SlzoCLI
from slzo.cli.parser import CommandParser, plain_parser
from slzo.commands.registry import Command


class _ParserOnly(SlzoCLI):
    """Builds the parser and nothing else."""

    def __init__(self, command: Command) -> None:
        self._command = command
        self.seed_everything_default, self.parser_class, self.auto_configure_optimizers = 0, AppParser, False
        self.setup_parser(False, {"description": command.help, "allow_abbrev": False}, {})


def parser_of(command: Command) -> CommandParser:
    """Return the parser of a command's options."""
    return _ParserOnly(command).parser if command.has_app else plain_parser(command)
