"""The one exception that stands for a mistake a user can mend."""


class SlzoError(Exception):
    """A wrong option, file or value.

    The message is one line: the option, the value it had, what is allowed and what to do next. The command line prints
    it without a traceback and exits with status 2.
    """
