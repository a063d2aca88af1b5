"""Reward for an answer that matches a regular expression."""

import re
from collections.abc import Sequence
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
