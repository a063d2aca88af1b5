"""Reward for words in common with a reference."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards import answers


def token_f1(completions: Sequence[Any], references: Sequence[Sequence[str]]) -> list[float]:
    """Harmonic mean of word precision and recall, the best over the row's references (SQuAD 1.1), 0 to 1."""
    return [answers.token_f1(answers.text_of(c), r) for c, r in zip(completions, references, strict=True)]
