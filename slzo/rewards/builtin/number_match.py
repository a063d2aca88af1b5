"""Reward for an answer whose last number is the last number of a reference."""

import math
import re
from collections.abc import Sequence
from typing import Any

from slzo.rewards.answers import text_of

_NUMBER = re.compile(r"(?:(?<![A-Za-z0-9.])[-+])?(?:\d[\d,]*(?:\.\d+)?|\.\d+)(?:[eE][-+]?\d{1,3})?")


def number_match(
    completions: Sequence[Any], references: Sequence[Sequence[str]], tolerance: float = 1e-6
) -> list[float]:
    """1 if the last number in the answer is the last one of a reference, else 0.

    ``tolerance`` is relative to the larger of the two.

    Commas within a number separate thousands: "The total is 1,250." matches "#### 1250". A hyphen after a letter or digit is
    not a minus sign: "top-10" has the number 10.
    """
    pairs = zip(completions, references, strict=True)
    return [float(_matches(last_number(text_of(completion)), texts, tolerance)) for completion, texts in pairs]


def last_number(text: str) -> float | None:
    """Return the last number in a text; ``None`` if there is none."""
    numbers = _NUMBER.findall(text.replace("\N{MINUS SIGN}", "-"))
    return float(numbers[-1].replace(",", "")) if numbers else None


def _matches(number: float | None, references: Sequence[str], tolerance: float) -> bool:
    expected = [last_number(text) for text in references]
    return number is not None and any(
        each is not None and math.isclose(number, each, rel_tol=tolerance) for each in expected
    )
