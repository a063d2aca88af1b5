"""Accuracy, MultiRC's answer F1 and exact match, and the F1 and exact match of generated answers.

Answers are normalized and compared as in the SQuAD 1.1 evaluation: lower case, no punctuation, no articles.
"""

import hashlib
import re
import string
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from slzo.tasks.base import Example, Kind, Task

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_answer(text: str) -> str:
    """Lower case, without ASCII punctuation and English articles, words one space apart."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def exact_match(prediction: str, references: Sequence[str]) -> float:
    """1.0 if the prediction equals a reference after normalization; an empty prediction matches empty texts only."""
    return max((float(_equal(prediction, text)) for text in references), default=float(not prediction.strip()))


def token_f1(prediction: str, references: Sequence[str]) -> float:
    """Harmonic mean of word precision and recall in 0..1, the best over the references."""
    return max((_pair_f1(prediction, text) for text in references), default=float(not prediction.strip()))


def _equal(prediction: str, reference: str) -> bool:
    if not prediction.strip() or not reference.strip():
        return not prediction.strip() and not reference.strip()
    return normalize_answer(prediction) == normalize_answer(reference)


def _pair_f1(prediction: str, reference: str) -> float:
    found, wanted = normalize_answer(prediction).split(), normalize_answer(reference).split()
    if not found or not wanted:
        return float(_equal(prediction, reference))
    common = (Counter(found) & Counter(wanted)).total()
    return 2 * common / (len(found) + len(wanted))


def row_score(metric: str, example: Example, prediction: int | str) -> float | None:
    """What one row scores, 0 to 1, in a metric that is the mean over rows.

    ``None`` for a row without a label, and for metrics that are no such mean (MultiRC's answer_f1 and question_em).
    """
    if not (example.gold or example.references):
        return None
    if metric == "accuracy":
        return float(prediction in example.gold)
    per_answer = {"f1": token_f1, "exact_match": exact_match}.get(metric)
    return None if per_answer is None else per_answer(str(prediction), example.references)


class TaskMetrics(Metric):
    """All metrics of a task; states add up over processes.

    Args:
        kind: Generation compares texts, the other kinds candidate indices.
        grouped: Also compute answer F1 and exact match per :attr:`Example.group` (MultiRC).
    """

    full_state_update = False
    rows: Tensor
    correct: Tensor
    f1_sum: Tensor
    exact_sum: Tensor
    hits: Tensor
    misses: Tensor
    group_keys: list[Tensor]
    group_correct: list[Tensor]

    def __init__(self, kind: Kind, grouped: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.kind = kind
        self.grouped = grouped and kind is not Kind.GENERATION
        self.add_state("rows", torch.tensor(0), dist_reduce_fx="sum")
        sums = {"f1_sum": 0.0, "exact_sum": 0.0} if kind is Kind.GENERATION else {"correct": 0, "hits": 0, "misses": 0}
        for name, start in sums.items():
            self.add_state(name, torch.tensor(start), dist_reduce_fx="sum")
        if self.grouped:
            self.add_state("group_keys", [], dist_reduce_fx="cat")
            self.add_state("group_correct", [], dist_reduce_fx="cat")
            self._add_to_groups([], [])

    def update(self, examples: Sequence[Example], predictions: Sequence[int] | Sequence[str] | Tensor) -> None:
        """Add labelled examples, each with a predicted candidate index or a generated text; the others do not count."""
        values = predictions.tolist() if isinstance(predictions, Tensor) else list(predictions)
        pairs = [pair for pair in zip(examples, values, strict=True) if pair[0].gold or pair[0].references]
        self.rows = self.rows + len(pairs)
        if self.kind is Kind.GENERATION:
            self.f1_sum = self.f1_sum + sum(token_f1(text, example.references) for example, text in pairs)
            self.exact_sum = self.exact_sum + sum(exact_match(text, example.references) for example, text in pairs)
            return
        right = [index in example.gold for example, index in pairs]
        self.correct = self.correct + sum(right)
        if self.grouped:
            # Label 1 is "this answer is right".
            self.hits = self.hits + sum(index == 1 and 1 in example.gold for example, index in pairs)
            self.misses = self.misses + sum((index == 1) != (1 in example.gold) for example, index in pairs)
            groups = [example.id if example.group is None else example.group for example, _ in pairs]
            self._add_to_groups([_stable_hash(group) for group in groups], right)

    def compute(self) -> dict[str, Tensor]:
        """Each metric by name, 0-dimensional, in 0..1; not a number if there was no labelled row."""
        if self.kind is Kind.GENERATION:
            return {"f1": self.f1_sum / self.rows, "exact_match": self.exact_sum / self.rows}
        scores = {"accuracy": self.correct / self.rows}
        if self.grouped:
            scores["answer_f1"] = 2 * self.hits / (2 * self.hits + self.misses).clamp(min=1)
            groups, member = dim_zero_cat(self.group_keys).unique(return_inverse=True)
            wrong = torch.zeros_like(groups).index_add_(0, member, 1 - dim_zero_cat(self.group_correct))
            scores["question_em"] = (wrong == 0).float().mean()
        return scores

    def reset(self) -> None:
        """Forget all rows."""
        super().reset()
        if self.grouped:
            self._add_to_groups([], [])  # a process without rows must still gather integers like the others

    def _add_to_groups(self, keys: Sequence[int], right: Sequence[bool]) -> None:
        self.group_keys.append(torch.tensor(keys, dtype=torch.int64, device=self.device))
        self.group_correct.append(torch.tensor(right, dtype=torch.int64, device=self.device))


def make_metrics(task: Task) -> TaskMetrics:
    """The metrics of a task; :attr:`Task.metric` is one of their names."""
    return TaskMetrics(task.kind, task.grouped)


def _stable_hash(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1
