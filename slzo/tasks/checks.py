"""Checks of options that tasks of one's own share."""

from collections.abc import Sequence

from slzo.errors import SlzoError


def check_max_new_tokens(value: int) -> int:
    """A number of tokens that an answer may have; SlzoError if it is none."""
    if value < 1:
        raise SlzoError(f"data.task.max_new_tokens {value}: must be at least 1")
    return value


def check_stop(texts: Sequence[str]) -> tuple[str, ...]:
    """Texts that may end an answer; SlzoError if one is empty."""
    if not all(texts):
        raise SlzoError(f"data.task.stop {list(texts)}: one is empty and would end every answer at once; leave it out")
    return tuple(texts)
