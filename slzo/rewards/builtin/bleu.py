"""BLEU by sacrebleu."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards.answers import text_of


def bleu(completions: Sequence[Any], references: Sequence[Sequence[str]]) -> list[float]:
    """BLEU of each answer (sacrebleu, with effective n-gram order), 0 to 1; several references count together.

    A score of single answers: its mean over rows is not the score of a corpus. Needs sacrebleu (pip install 'slzo[rewards]').
    """
    from sacrebleu.metrics import BLEU

    metric = BLEU(effective_order=True)
    pairs = zip(completions, references, strict=True)
    return [metric.sentence_score(text_of(text), list(own)).score / 100 if own else 0.0 for text, own in pairs]
