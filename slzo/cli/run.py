"""Runs a command with its options; imports only what the command needs."""

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from slzo.cli.parser import command_function, exists, plain_parser, read_given
from slzo.cli.shipped_configs import CONFIG_OPTIONS, missing_tool, shipped_configs, with_shipped_configs
from slzo.commands.registry import COMMANDS, Command
from slzo.utils.errors import SlzoError


def run_command(name: str, args: Sequence[str]) -> None:
    """Run a command with its options.

    Raises:
        SlzoError: An option or a file is wrong.
    """
    found = with_shipped_configs(args)
    try:
        _run(COMMANDS[name], found)
    except SlzoError as error:
        if found != list(args) and (note := missing_tool(str(error))):
            raise SlzoError(f"{error}{note}") from error
        raise


def _run(command: Command, args: Sequence[str]) -> None:
    if args and not args[0].startswith("-") and not command.words:
        is_config = args[0] in shipped_configs() or Path(args[0]).suffix in (".yaml", ".yml")
        option = "ckpt_path" if exists(Path(args[0])) and not is_config else "config"
        raise SlzoError(f"{args[0]!r}: belongs to no option; write it as --OPTION VALUE, such as --{option} {args[0]}")
    if str(Path.cwd()) not in sys.path:
        sys.path.append(str(Path.cwd()))  # for class paths of the user's own files
    if command.runs_model:
        from slzo.cli.process import prepare_process

        prepare_process()
    if command.has_app:
        from slzo.cli.app import run_with_app

        run_with_app(command, args)
    else:
        _run_plain(command, args)


def _run_plain(command: Command, args: Sequence[str]) -> None:
    parser, args = plain_parser(command), _named(command, args)
    names = [word.partition("=")[0].removeprefix("--") for word in args if word.startswith("--")]
    if twice := next((name for name in names if names.count(name) > 1 and name != "config"), None):
        raise SlzoError(f"{twice}: given twice, and only the last would count; give it once")
    parser.given = read_given(args)
    options = parser.parse_args(list(args)).as_dict()
    options.pop("config", None)
    command_function(command)(**options)


def _named(command: Command, args: Sequence[str]) -> list[str]:
    """Pass the words that belong to no option to the option that takes them."""
    if not command.words:
        return list(args)
    words, rest, is_value = [], [], False
    for arg in args:
        if is_value or arg.startswith("-"):
            rest.append(arg)
            takes_value = arg.startswith("--") and "=" not in arg and arg != "--help"
            is_value = not is_value and (takes_value or arg in CONFIG_OPTIONS)
        else:
            words.append(arg)
    return [f"--{command.words}={json.dumps(words, ensure_ascii=False)}", *rest] if words else rest
