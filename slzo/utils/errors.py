"""Exceptions for errors that the user can fix, and for signals."""

import signal


class SlzoError(Exception):
    """A wrong option, file or value.

    The message is one line: the option, the value it had, what is allowed and what to do next. The command line prints
    it without a traceback and exits with status 2.
    """


class RowError(SlzoError):
    """A row that cannot be used; the message names its place. See :mod:`slzo.data.sources`."""


class Interrupted(BaseException):  # not an Exception, so that error handlers do not catch it
    """A signal ended the run; the command line exits with status 128 + number, as shells report it.

    Args:
        number: Number of the signal.
        saved: Whether the state after the last step was saved; the same on every process.
    """

    def __init__(self, number: int, saved: bool = False) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number
        self.saved = saved

    @property
    def status(self) -> int:
        """The exit status: 130 for Ctrl-C, 143 for SIGTERM."""
        return 128 + self.number
