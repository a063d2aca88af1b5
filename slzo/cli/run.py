"""Runs a command with its options; imports only what the command needs."""

import json
import os
import sys
from collections.abc import Sequence
from contextlib import ExitStack
from inspect import signature
from pathlib import Path

from slzo.cli.given import one_word_each
from slzo.cli.parser import command_function, plain_parser, read_given
from slzo.cli.shipped_configs import missing_tool, shipped_configs, with_shipped_configs
from slzo.commands.registry import COMMANDS, Command
from slzo.utils.errors import SlzoError
from slzo.utils.files import disk_errors
from slzo.utils.run_layout import CONFIG_FILE


def run_command(name: str, args: Sequence[str]) -> None:
    """Run a command with its options.

    Raises:
        SlzoError: An option or a file is wrong.
    """
    words = one_word_each(args)
    found = with_shipped_configs(words)
    try:
        _run(COMMANDS[name], found)
    except SlzoError as error:
        if found != words and (note := missing_tool(str(error))):
            raise SlzoError(f"{error}{note}") from error
        raise


def _run(command: Command, words: Sequence[str]) -> None:
    if words and not (first := words[0]).startswith("-") and not command.words:
        is_config = first in shipped_configs() or Path(first).suffix in (".yaml", ".yml")
        option, value = "config", first
        if os.path.exists(first) and not is_config:  # noqa: PTH110  any text
            takes = signature(command_function(command)).parameters
            option = next((name for name in ("ckpt_path", "run") if name in takes), "config")
            value = str(Path(first, CONFIG_FILE)) if option == "config" and Path(first).is_dir() else first
        raise SlzoError(f"{first!r}: is not an option; write it as --OPTION VALUE, such as --{option} {value}")
    try:
        folder = str(Path.cwd())
    except FileNotFoundError as error:
        raise SlzoError("the current folder was removed; go to another one, and give the command again") from error
    if folder not in sys.path:
        sys.path.append(folder)  # for class paths of the user's own files
    with ExitStack() as stack:
        stack.enter_context(disk_errors())
        if command.runs_model:
            from slzo.cli.process import memory_errors, prepare_process

            prepare_process()
            stack.enter_context(memory_errors())
        if command.has_app:
            from slzo.cli.app import run_with_app

            run_with_app(command, words)
        else:
            _run_plain(command, words)


def _run_plain(command: Command, words: Sequence[str]) -> None:
    if command.words and (bare := [word for word in words if not word.startswith("-")]):
        given = [word for word in words if word.startswith("-")]
        words = [f"--{command.words}={json.dumps(bare, ensure_ascii=False)}", *given]
    names = [word.partition("=")[0].removeprefix("--") for word in words if word.startswith("--")]
    if twice := next((name for name in names if names.count(name) > 1 and name != "config"), None):
        raise SlzoError(f"{twice}: given twice, and only the last would count; give it once")
    parser = plain_parser(command)
    parser.given = read_given(words)
    options = parser.parse_args(list(words)).as_dict()
    options.pop("config", None)
    command_function(command)(**options)
