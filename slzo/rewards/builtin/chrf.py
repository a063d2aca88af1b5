"""chrF by sacrebleu."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards.answers import text_of


def chrf(completions: Sequence[Any], references: Sequence[Sequence[str]]) -> list[float]:
    """ChrF of each answer (sacrebleu), 0 to 1, the best over the row's references.

    A score of single answers: its mean over rows is not the score of a corpus. Needs sacrebleu (pip install 'slzo[rewards]').
    """
    from sacrebleu.metrics import CHRF

    metric = CHRF()
    pairs = zip(completions, references, strict=True)
    return [metric.sentence_score(text_of(text), list(own)).score / 100 if own else 0.0 for text, own in pairs]
