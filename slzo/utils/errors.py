"""Exceptions for errors that the user can fix, and for signals."""

import difflib
import signal
from collections.abc import Iterable


class SlzoError(Exception):
    """A wrong option, file or value.

    The message is one line: the option, the value it had, what is allowed and what to do next. The command line prints
    it without a traceback and exits with status 2.
    """


def one_line(error: BaseException, limit: int | None = 200) -> str:
    """Return the message of an error in one line, with at most ``limit`` characters, or its class if it has no message."""
    return " ".join(str(error).split())[:limit] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str], otherwise: str = "", *, before: str = "", cutoff: float = 0.6) -> str:
    """Return a question that suggests the closest of the known names, preceded by ``before``; ``otherwise`` if none is close."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"did you mean {before}{near[0]}?" if near else otherwise


def short_repr(value: object) -> str:
    """Return the repr of a value, truncated to fit in a one-line message."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def broken_contract(option: str, part: object, returned: str, wanted: str) -> SlzoError:
    """Return the error for a user-defined class that returns a wrong value.

    Args:
        option: Option that names the class.
        part: Object of the class.
        returned: What a method returned, such as ``select() returned None``.
        wanted: What it must return.
    """
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    return SlzoError(f"{option} {name}: {returned}; it must return {wanted} (docs/extending.md)")


class RowError(SlzoError):
    """A row that cannot be used; the message names its place. See :mod:`slzo.data.sources`."""


class Interrupted(BaseException):  # not an Exception, so that error handlers do not catch it
    """A signal ended the run; the command line exits with status 128 + number, as shells report it.

    Args:
        number: Number of the signal.
        saved: Whether all processes stop at the same step, whose state is saved if anything is.
    """

    def __init__(self, number: int, saved: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved

    @property
    def status(self) -> int:
        """The exit status: 130 for Ctrl-C, 143 for SIGTERM, 138 for SIGUSR1."""
        return 128 + self.number
