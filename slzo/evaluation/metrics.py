"""Task metrics: accuracy, MultiRC's answer F1 and exact match, and scores of generated answers."""

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from slzo.rewards.registry import PERPLEXITY, answer_metric
from slzo.tasks.base import Example, Kind, Task


def row_score(metric: str, example: Example, prediction: int | str) -> float | None:
    """Return the score of one row, 0 to 1, in a metric that is a mean over rows.

    ``None`` for a row without a label, and for other metrics (MultiRC's answer_f1 and question_em, perplexity).
    """
    if not example.is_labelled:
        return None
    if isinstance(prediction, str):
        return None if metric == PERPLEXITY else answer_metric(metric, prediction, example.references)
    return float(prediction in example.gold) if metric == "accuracy" else None


_LARGEST_LOSS = math.log(sys.float_info.max)


def perplexity_by_row(rows: Mapping[str, tuple[float, float]]) -> dict[str, float]:
    """Return one value per row; their mean is the perplexity, and their spread gives its standard error.

    The perplexity is exp(R) with R = sum S / sum N, over rows with summed loss S and N answer tokens. A row's first-order effect
    on it is exp(R) (S - R N) / mean(N) (the delta method for a ratio). The value of a row is this effect plus exp(R).

    Args:
        rows: S and N of each row, by row id.
    """
    tokens = sum(count for _, count in rows.values())
    if not tokens:
        return {}
    loss = sum(total for total, _ in rows.values()) / tokens
    mean_count = tokens / len(rows)
    perplexity = math.exp(loss) if loss < _LARGEST_LOSS else math.inf
    return {name: perplexity * (1 + (total - loss * count) / mean_count) for name, (total, count) in rows.items()}


class TaskMetrics(Metric):
    """All metrics of a task but the perplexity; states are summed over processes.

    A grouped task also has the F1 of its answers and the exact match of each :attr:`Example.group` (MultiRC).

    Attributes:
        names: Names of the metrics.
    """

    full_state_update = False
    rows: Tensor
    hits: Tensor
    misses: Tensor
    groups: list[Tensor]

    def __init__(self, task: Task) -> None:
        super().__init__()
        generates = task.kind is Kind.GENERATION
        self.grouped = task.grouped and not generates
        self._means = [name for name in task.metrics if name != PERPLEXITY] if generates else ["accuracy"]
        self.names = [*self._means, *(("answer_f1", "question_em") if self.grouped else ())]
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        for name in self._means:
            self.add_state(f"{name}_sum", torch.tensor(0.0), dist_reduce_fx="sum")
        if self.grouped:
            for name in ("hits", "misses"):
                self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")
            self.add_state("groups", [], dist_reduce_fx="cat")
            self._add_to_groups([], [])

    def update(self, examples: Sequence[Example], predictions: Sequence[int] | Sequence[str]) -> None:
        """Add examples with their predictions, candidate indices or generated texts; examples without a label are ignored."""
        both: Iterable[tuple[Example, int | str]] = zip(examples, predictions, strict=True)
        pairs = [(example, prediction) for example, prediction in both if example.is_labelled]
        self.rows = self.rows + len(pairs)
        for name in self._means:
            total = sum(row_score(name, *pair) or 0.0 for pair in pairs)
            setattr(self, f"{name}_sum", getattr(self, f"{name}_sum") + total)
        if self.grouped:
            # label 1 means "this answer is right"
            self.hits = self.hits + sum(index == 1 and 1 in example.gold for example, index in pairs)
            self.misses = self.misses + sum((index == 1) != (1 in example.gold) for example, index in pairs)
            groups = [example.id if example.group is None else example.group for example, _ in pairs]
            right = [index in example.gold for example, index in pairs]
            self._add_to_groups([_stable_hash(group) for group in groups], right)

    def compute(self) -> dict[str, Tensor]:
        """Return each metric by name, 0-dimensional, in 0..1; NaN if there was no labelled row."""
        scores = {name: getattr(self, f"{name}_sum") / self.rows for name in self._means}
        if self.grouped:
            scores["answer_f1"] = 2 * self.hits / (2 * self.hits + self.misses).clamp(min=1)
            if self.rows == 0:
                scores["answer_f1"].fill_(math.nan)
            keys, right = dim_zero_cat(self.groups).unbind(dim=1)
            distinct, member = keys.unique(return_inverse=True)
            wrong = torch.zeros_like(distinct).index_add_(0, member, 1 - right)
            scores["question_em"] = (wrong == 0).float().mean()
        return scores

    def reset(self) -> None:
        """Reset all states."""
        super().reset()
        if self.grouped:
            self._add_to_groups([], [])  # a process without rows must still gather integers like the others

    def _add_to_groups(self, keys: Sequence[int], right: Sequence[bool]) -> None:
        self.groups.append(torch.tensor([keys, right], dtype=torch.int64, device=self.device).T)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
