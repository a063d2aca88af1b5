"""Rows that cannot be used: the first one ends the command, or they are left out and told."""

from collections.abc import Callable, Sequence
from typing import NoReturn

from slzo.errors import RowError, SlzoError

OnBadRow = Callable[[RowError], None]
"""What to do with a row that cannot be used: raise, or take note of it; the next one follows."""

_TOLD = 3


def refuse(error: RowError) -> NoReturn:
    """Raise, with the option that leaves such rows out."""
    raise SlzoError(f"{error}; data.skip_bad_rows true leaves such rows out") from None


def tell_left_out(left_out: Sequence[RowError], used: int, source: str) -> str:
    """Lines for the log: how many rows of a source were left out, and the first of them.

    Raises:
        SlzoError: No row can be used.
    """
    total = len(left_out) + used
    if not used:
        raise SlzoError(
            f"{source}: none of the {total} rows can be used (data.skip_bad_rows leaves them out); mend them, the first is"
            f" {left_out[0]}"
        )
    first = [f"  {error}" for error in left_out[:_TOLD]]
    more = ["  ..."] if len(left_out) > _TOLD else []
    return "\n".join(
        [
            f"Left out {len(left_out)} of {total} rows of {source} that cannot be used (data.skip_bad_rows):",
            *first,
            *more,
        ]
    )
