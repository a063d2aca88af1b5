"""Reward for an answer that equals a reference after normalization."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards import answers


def exact_match(completions: Sequence[Any], references: Sequence[Sequence[str]]) -> list[float]:
    """1 if the answer equals one of its row's references without case, punctuation and articles (SQuAD 1.1), else 0."""
    return [answers.exact_match(answers.text_of(c), r) for c, r in zip(completions, references, strict=True)]
