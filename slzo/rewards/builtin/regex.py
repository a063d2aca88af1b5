"""Reward for an answer that matches a regular expression."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from slzo.rewards.answers import text_of


def regex(completions: Sequence[Any], pattern: str | Sequence[str], whole: bool = False) -> list[float]:
    """1 if the pattern is found in the answer (``whole``: matches all of it), else 0.

    ``pattern`` is one for all rows, as an argument, or each row's own, as a field of that name.
    """
    patterns = [pattern] * len(completions) if isinstance(pattern, str) else pattern
    pairs = zip(patterns, completions, strict=True)
    match = re.fullmatch if whole else re.search
    return [float(bool(match(own, text_of(completion)))) for own, completion in pairs]


def _check(arguments: Mapping[str, Any]) -> None:
    """Raise ValueError if the pattern for all rows is not a regular expression."""
    pattern = arguments.get("pattern", "")
    if not isinstance(pattern, str):
        raise ValueError(f"pattern {pattern!r} must be text; correct it")
    try:
        re.compile(pattern)
    except re.error as error:
        raise ValueError(f"pattern {pattern!r} is not a regular expression ({error}); correct it") from None


regex.check = _check  # type: ignore[attr-defined]  # for slzo.rewards.calls.load_function
