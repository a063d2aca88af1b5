"""Score held-out rows: metrics, and the score of each row."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from slzo.data.batch import EvalBatch
from slzo.evaluation.evaluator import Evaluator, Outcome, RunningScore, gold_loss_by_row, records, score_rows
from slzo.evaluation.metrics import perplexity_by_row, row_score
from slzo.rewards.registry import PERPLEXITY
from slzo.tasks.base import Example
from slzo.utils.process_group import gather_from_processes


@dataclass(frozen=True)
class HeldOutScores:
    """Metrics of the held-out rows, and the score of each row, by id, in the metric that summarizes the run.

    ``rows`` is empty if the metric is not a mean over rows. For a perplexity see
    :func:`slzo.evaluation.metrics.perplexity_by_row`.
    """

    metrics: dict[str, float]
    rows: dict[str, float]


def score_held_out(
    evaluator: Evaluator,
    batches: Iterable[EvalBatch],
    score: RunningScore,
    metric: str,
    num_samples: int = 0,
    keep_prefix: bool = False,
) -> tuple[HeldOutScores, dict[int, dict[str, Any]]]:
    """Score rows with the live weights, see :func:`score_rows`; ``metric`` is the one that summarizes the run.

    Returns:
        The scores, and the records of the ``num_samples`` first rows by position in the split, see :func:`records`. These also
        have ``gold_texts``, the correct answers as texts.
    """
    scores: list[tuple[str, float]] = []
    losses: list[tuple[str, tuple[float, float]]] = []
    samples: list[tuple[int, dict[str, Any]]] = []

    def keep(batch: EvalBatch, outcome: Outcome) -> None:
        if any(row.position < num_samples for row in batch.rows):
            for row, record in zip(batch.rows, records(batch, outcome), strict=True):
                if row.position < num_samples:
                    samples.append((row.position, {**record, "gold_texts": _gold_texts(row.example)}))
        if metric == PERPLEXITY:
            losses.extend(gold_loss_by_row(batch, outcome).items())
            return
        predictions: Sequence[int | str] = outcome.predictions
        rewards = outcome.rewarded.totals if outcome.rewarded is not None and metric == "reward" else None
        for place, (example, prediction) in enumerate(zip(batch.examples, predictions, strict=True)):
            value = row_score(metric, example, prediction) if rewards is None else rewards[place]
            if value is not None and math.isfinite(value):
                scores.append((example.id, value))

    found = score_rows(evaluator, batches, score, keep_prefix, seen=keep)
    if metric == PERPLEXITY:
        by_row = perplexity_by_row(dict(gather_from_processes(losses)))
    else:
        by_row = dict(gather_from_processes(scores))
    found.pop("loss", None)
    scored = HeldOutScores({metric: math.nan, **found}, by_row)  # without gold answers there is no perplexity
    return scored, dict(gather_from_processes(samples))


def _gold_texts(example: Example) -> list[str]:
    return list(example.references) or [example.candidates[index].strip() for index in example.gold]
