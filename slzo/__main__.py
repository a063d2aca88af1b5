"""Entry point of the ``slzo`` command; answers --help and --version without loading torch."""

import sys
from collections.abc import Sequence

from slzo import __version__
from slzo.commands import COMMANDS
from slzo.errors import SlzoError
from slzo.renames import RENAMED_COMMANDS

_INTERRUPTED = 130  # what shells report of a command that Ctrl-C ended

_HELP = f"""usage: slzo COMMAND [--config FILE] [--OPTION VALUE ...]

slzo {__version__}: fine-tune a language model with forward passes only, by tuning its one dominant decoder layer.

commands:
{chr(10).join(f"  {command.name:10s} {command.help}" for command in COMMANDS.values())}

options:
  -h, --help     this text; `slzo COMMAND --help` lists the options of a command
  --version      the version

examples:
  slzo fit --config configs/quickstart.yaml
  slzo fit --config configs/quickstart.yaml --data.task sst2 --data.data_dir DIR --model.eps 1e-3
  slzo sweep --config configs/quickstart.yaml --sensitivity_only true
  slzo lr_search --config configs/quickstart.yaml --lrs '[1e-4,3e-4,1e-3]'
  slzo test --ckpt_path runs/version_0/checkpoints/last.ckpt
  slzo export --ckpt_path last --output tuned-model
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status: 0, 2 after a mistake that the user can mend, 130 after Ctrl-C."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        sys.stdout.write(_HELP)
        return 0
    if args[0] == "--version":
        sys.stdout.write(f"slzo {__version__}\n")
        return 0
    try:
        if args[0] in RENAMED_COMMANDS:
            raise SlzoError(f"command {args[0]!r}: is called {RENAMED_COMMANDS[args[0]]} now")
        if args[0] not in COMMANDS:
            raise SlzoError(f"command {args[0]!r}: unknown; choose one of {', '.join(COMMANDS)} (see slzo --help)")
        from slzo.cli import run  # takes seconds: torch, Lightning and transformers

        run(args)
    except SlzoError as error:
        sys.stderr.write(f"slzo: error: {error}\n")
        return 2
    except KeyboardInterrupt:
        goes_on = "; the same command goes on where it stopped" if COMMANDS[args[0]].goes_on else ""
        sys.stderr.write(f"slzo: interrupted{goes_on}\n")
        return _INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
