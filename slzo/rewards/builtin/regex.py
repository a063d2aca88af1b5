"""Reward for an answer that matches a regular expression."""

import re
from collections.abc import Sequence
from typing import Any

from slzo.rewards.answers import text_of


def check_pattern(pattern: object) -> None:
    """Raise ValueError with the reason if a pattern for all rows is not a regular expression."""
    if not isinstance(pattern, str):
        raise ValueError("must be text")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"is not a regular expression ({error})") from None


def regex(completions: Sequence[Any], pattern: str | Sequence[str], whole: bool = False) -> list[float]:
    """1 if the pattern is found in the answer (``whole``: matches all of it), else 0.

    ``pattern`` is one for all rows, as an argument, or each row's own, as a field of that name.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    pairs = zip(patterns, completions, strict=True)
    match = re.fullmatch if whole else re.search
    return [float(bool(match(own, text_of(completion)))) for own, completion in pairs]
