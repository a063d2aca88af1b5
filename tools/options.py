"""The options of a tool: the fields of a dataclass, each with its default and its help."""

import argparse
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from transformers.hf_argparser import DataClassType, HfArgumentParser

from slzo.utils.errors import SlzoError
from slzo.utils.files import disk_errors

_Options = TypeVar("_Options")


def option(default: Any = MISSING, help: str = "", choices: Sequence[str] | None = None) -> Any:
    """Return a dataclass field for an option; without a default it is required. A list takes one or more words."""
    if default is not False and default not in (MISSING, None, []):
        help += f" (default: {' '.join(map(str, default)) if isinstance(default, list) else default})"
    metadata = {"help": help.strip()} | ({} if choices is None else {"choices": list(choices)})
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def parse(options: type[_Options], description: str | None, arguments: Sequence[str] | None = None) -> _Options:
    """Parse the options, by default those of the command line; a wrong one ends the process with its usage."""
    parser = HfArgumentParser(
        DataClassType(options), description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    return options(**vars(parser.parse_args(arguments)))


def command(main: Callable[[Sequence[str] | None], int | None]) -> Callable[..., int]:
    """Decorate the main function of a tool: an error of the user or of a file ends it in one line, with status 2.

    So does Ctrl-C, with status 130. The function takes the command line's words, ``None`` for those of the process, and
    returns the exit status.
    """

    @wraps(main)
    def run(argv: Sequence[str] | None = None) -> int:
        try:
            with disk_errors():
                return main(argv) or 0
        except SlzoError as error:
            print(f"{Path(main.__code__.co_filename).stem}: error: {error}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{Path(main.__code__.co_filename).stem}: interrupted", file=sys.stderr)
            return 130

    return run
