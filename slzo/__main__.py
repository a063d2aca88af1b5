"""Entry point of the ``slzo`` command; answers --help and --version without loading torch."""

import logging
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType

from slzo.commands.registry import COMMANDS
from slzo.utils.console import is_worker, rank_zero_print
from slzo.utils.errors import Interrupted, SlzoError
from slzo.utils.peers import launcher_ends
from slzo.utils.signals import handle_signals, termination_signals
from slzo.version import __version__

_HELP = f"""usage: slzo COMMAND [--config FILE] [--OPTION VALUE ...]

slzo {__version__}: fine-tune one decoder layer of a language model without back-propagation through the layers above it.

commands:
{chr(10).join(f"  {command.name:10s} {command.help}" for command in COMMANDS.values())}

options:
  -h, --help     this text; `slzo COMMAND --help` lists the options of a command
  --version      the version

exit status:
  0 done   2 an error in options or files, explained in one line   1 any other error: a bug, or an error in your own class
  130 ended by Ctrl-C   143 ended by SIGTERM   138 ended by SIGUSR1 in a SLURM job;
  fit ends after the step or validation under way, saves it and prints how to continue

examples:
  slzo fit --config quickstart
  slzo fit --config quickstart --data.task sst2 --data.data_dir DIR
  slzo sweep --config quickstart --lrs '[1e-4,3e-4,1e-3]'
  slzo test --ckpt_path runs/version_0/checkpoints/last.ckpt
  slzo export --ckpt_path best --output tuned-model
  slzo generate --ckpt_path best --prompt "A warm and funny film. It was"
"""

# seconds in which the process that started this one ends, if it has an error too; it takes some to release its memory
_PATIENCE_S = 10.0

# these packages log warnings that no user can act on
_CHATTY = ("torchao", "torch.utils._pytree", "bitsandbytes", "transformers.utils.generic")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit status, see ``slzo --help``."""
    args = list(sys.argv[1:] if argv is None else argv)
    if not args or args[0] in ("-h", "--help"):
        rank_zero_print(_HELP.rstrip())
        return 0
    if args[0] == "--version":
        rank_zero_print(f"slzo {__version__}")
        return 0
    try:
        if args[0] not in COMMANDS:
            raise SlzoError(f"command {args[0]!r}: unknown; choose one of {', '.join(COMMANDS)} (see slzo --help)")
        for name in _CHATTY:
            logging.getLogger(name).setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module=r"transformers\.")  # those are for peft
        _limit_spinning()
        with signals_raise():
            from slzo.cli.run import run_command  # imports the parser's packages, which --help does not need

            run_command(args[0], args[1:])
    except SlzoError as error:
        if not launcher_ends(_PATIENCE_S):  # an error that all processes have is printed once
            sys.stderr.write(f"slzo: error: {error}\n")
        return 2
    except (Interrupted, KeyboardInterrupt, SystemExit) as stop:
        status = _interrupt_status(stop)
        if status is None:
            raise
        resumes = "; the same command continues where it stopped" if COMMANDS[args[0]].resumes else ""
        if not is_worker():  # the process that has started the workers reports it
            sys.stderr.write(f"slzo: interrupted{resumes}\n")
        return status
    return 0


def _limit_spinning() -> None:
    """Let threads of libgomp spin only briefly while they wait for each other, unless the user has set how they wait.

    By default they spin for milliseconds. If another process takes a core, the thread that they wait for cannot run meanwhile.
    libgomp reads the variable when torch is imported.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")


def _interrupt_status(stop: BaseException) -> int | None:
    """Return the exit status of a run that a signal ended; ``None`` if no signal did."""
    if isinstance(stop, Interrupted):
        return stop.status
    # Lightning turns Ctrl-C into an exit, and SIGTERM into an exception of its own
    if isinstance(stop, KeyboardInterrupt) or isinstance(stop.__context__, KeyboardInterrupt):
        return 128 + signal.SIGINT
    return 128 + signal.SIGTERM if type(stop).__name__ == "SIGTERMException" else None


@contextmanager
def signals_raise() -> Iterator[None]:
    """Raise at SIGTERM, and in a SLURM job at SIGUSR1, as at Ctrl-C, unless another handler is installed."""

    def end(number: int, frame: FrameType | None) -> None:
        raise Interrupted(number)

    with handle_signals([each for each in termination_signals() if signal.getsignal(each) == signal.SIG_DFL], end):
        yield


if __name__ == "__main__":
    sys.exit(main())
