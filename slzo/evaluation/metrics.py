"""Task metrics: accuracy, macro F1, MultiRC's answer F1 and exact match, and scores of generated answers."""

import hashlib
import math
import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric, MetricCollection
from torchmetrics.functional.classification import multiclass_f1_score
from torchmetrics.utilities import dim_zero_cat

from slzo.rewards.registry import PERPLEXITY, answer_metric
from slzo.tasks.base import Example, Kind, Task


def row_score(metric: str, example: Example, prediction: int | str) -> float | None:
    """Return the score of one row, 0 to 1, in a metric that is a mean over rows.

    ``None`` for a row without a label, and for other metrics (macro_f1, answer_f1, question_em, perplexity).
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


class RowScores(Metric):
    """Means over rows: accuracy, or scores of generated answers.

    Args:
        names: Names of the metrics, see :func:`row_score`.
    """

    full_state_update = False
    rows: Tensor
    totals: Tensor

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = tuple(names)
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        self.add_state("totals", torch.zeros(len(names)), dist_reduce_fx="sum")

    def update(self, examples: Sequence[Example], predictions: Sequence[int | str]) -> None:
        """Add labelled examples with their predictions."""
        self.rows = self.rows + len(examples)
        pairs = list(zip(examples, predictions, strict=True))
        totals = [sum(row_score(name, *pair) or 0.0 for pair in pairs) for name in self.names]
        self.totals = self.totals + self.totals.new_tensor(totals)

    def compute(self) -> dict[str, Tensor]:
        """Return the means by name."""
        return dict(zip(self.names, self.totals / self.rows, strict=True))


class _RowPairs(Metric):
    """Base class of metrics that keep two whole numbers of each row. For ``options`` see :class:`torchmetrics.Metric`."""

    full_state_update = False
    pairs: list[Tensor]

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.add_state("pairs", [], dist_reduce_fx="cat")
        self._add([], [])  # a process without rows must still gather integers like the others

    def _add(self, first: Sequence[int], second: Sequence[int]) -> None:
        self.pairs.append(torch.tensor([first, second], dtype=torch.int64, device=self.device).T)

    def _columns(self) -> tuple[Tensor, Tensor]:
        first, second = dim_zero_cat(self.pairs).unbind(dim=1)
        return first, second


class MacroF1(_RowPairs):
    """Mean of the F1 of all classes that occur, each of which counts equally.

    If several answers of a row are right, its class is the predicted one, or the first if the prediction is wrong.
    """

    names = ("macro_f1",)

    def update(self, examples: Sequence[Example], predictions: Sequence[int]) -> None:
        """Add labelled examples with their predictions."""
        pairs = list(zip(examples, predictions, strict=True))
        gold = [index if index in example.gold else example.gold[0] for example, index in pairs]
        # by their texts, because rows may have their candidates in different orders
        predicted, wanted = (
            [_stable_hash(example.candidates[index]) for example, index in zip(examples, indices, strict=True)]
            for indices in (predictions, gold)
        )
        self._add(predicted, wanted)

    def compute(self) -> dict[str, Tensor]:
        """Return ``macro_f1``."""
        pairs = torch.stack(self._columns())
        if not pairs.numel():
            return {"macro_f1": torch.tensor(math.nan, device=self.device)}
        classes, (predicted, gold) = pairs.unique(return_inverse=True)
        return {"macro_f1": multiclass_f1_score(predicted, gold, num_classes=max(2, len(classes)), average="macro")}


def macro_f1(examples: Sequence[Example], predictions: Sequence[int]) -> float:
    """Return the macro F1 of labelled examples of this process alone, see :class:`MacroF1`."""
    metric = MacroF1(sync_on_compute=False)
    metric.update(examples, predictions)
    return metric.compute()["macro_f1"].item()


class GroupedAnswers(_RowPairs):
    """The F1 of all answers, and the exact match of each :attr:`Example.group` (MultiRC).

    Label 1 means that the answer is right.
    """

    names = ("answer_f1", "question_em")
    hits: Tensor
    misses: Tensor

    def __init__(self) -> None:
        super().__init__()
        for name in ("hits", "misses"):
            self.add_state(name, torch.tensor(0), dist_reduce_fx="sum")

    def update(self, examples: Sequence[Example], predictions: Sequence[int]) -> None:
        """Add labelled examples with their predictions."""
        pairs = list(zip(examples, predictions, strict=True))
        self.hits = self.hits + sum(index == 1 and 1 in example.gold for example, index in pairs)
        self.misses = self.misses + sum((index == 1) != (1 in example.gold) for example, index in pairs)
        groups = [example.id if example.group is None else example.group for example in examples]
        self._add([_stable_hash(group) for group in groups], [index in example.gold for example, index in pairs])

    def compute(self) -> dict[str, Tensor]:
        """Return ``answer_f1`` and ``question_em``."""
        groups, right = self._columns()
        distinct, member = groups.unique(return_inverse=True)
        wrong = torch.zeros_like(distinct).index_add_(0, member, 1 - right)
        f1 = 2 * self.hits / (2 * self.hits + self.misses).clamp(min=1)
        return {"answer_f1": f1 if len(groups) else f1 * math.nan, "question_em": (wrong == 0).float().mean()}


class TaskMetrics:
    """All metrics of a task but the perplexity, with states on a device.

    Attributes:
        names: Names of the metrics.
    """

    def __init__(self, task: Task, device: torch.device | str = "cpu") -> None:
        generates = task.kind is Kind.GENERATION
        rows = RowScores([name for name in task.metrics if name != PERPLEXITY] if generates else ["accuracy"])
        metrics: list[RowScores | MacroF1 | GroupedAnswers] = [rows]
        if task.kind is Kind.CLASSIFICATION:
            metrics.append(MacroF1())
        if task.grouped and not generates:
            metrics.append(GroupedAnswers())
        self.names = [name for metric in metrics for name in metric.names]
        self._metrics = MetricCollection(*metrics, compute_groups=False).to(device)

    def update(self, examples: Sequence[Example], predictions: Sequence[int] | Sequence[str]) -> None:
        """Add examples with their predictions, candidate indices or generated texts; examples without a label are ignored."""
        both: Iterable[tuple[Example, int | str]] = zip(examples, predictions, strict=True)
        pairs = [(example, prediction) for example, prediction in both if example.is_labelled]
        self._metrics.update([example for example, _ in pairs], [prediction for _, prediction in pairs])

    def compute(self) -> dict[str, Tensor]:
        """Return each metric by name, over all processes, 0-dimensional, in 0..1; NaN if there was no labelled row."""
        found = self._metrics.compute()
        return {name: found[name] for name in self.names}


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
