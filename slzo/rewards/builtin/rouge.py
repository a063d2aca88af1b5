"""Reward by ROUGE, computed by the package rouge-score."""

from collections.abc import Sequence
from typing import Any

from slzo.rewards.answers import text_of


def rouge(completions: Sequence[Any], references: Sequence[Sequence[str]], variant: str = "rougeL") -> list[float]:
    """F-measure of ROUGE (``variant``: rouge1, rouge2, rougeL, rougeLsum), 0 to 1, the best over the row's references.

    Needs rouge-score (pip install 'slzo[rewards]').
    """
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([variant], use_stemmer=True)
    pairs = zip(completions, references, strict=True)
    return [
        max((float(scorer.score(text, text_of(completion))[variant].fmeasure) for text in texts), default=0.0)
        for completion, texts in pairs
    ]


rouge.package = "rouge_score"  # type: ignore[attr-defined]  # for slzo.rewards.registry.check_package
