"""Reward for an answer that equals a reference exactly."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards.answers import text_of


def accuracy(completions: Sequence[Any], references: Sequence[Sequence[str]]) -> list[float]:
    """1 if the answer is one of its row's references, except for outer white space, else 0."""
    pairs = zip(completions, references, strict=True)
    return [float(text_of(completion).strip() in [text.strip() for text in texts]) for completion, texts in pairs]
