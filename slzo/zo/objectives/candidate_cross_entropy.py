"""Cross-entropy over the candidates' scores."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from slzo.batches.losses import LossSum, by_example
from slzo.batches.packing import PackedBatch
from slzo.utils.errors import SlzoError
from slzo.zo.objectives.base import CandidateObjective


class CandidateCrossEntropy(CandidateObjective):
    """Cross-entropy over the candidates' scores, averaged over labelled examples: the loss of classification tasks (MeZO).

    Args:
        class_weights: Weight of the rows of each candidate, in the candidates' order, for classes of unequal size; left out, all
            rows count the same. The mean is over the weights; dev and held-out losses are reported without them.

    Raises:
        SlzoError: A weight is not a number above 0.
    """

    def __init__(self, class_weights: list[float] | None = None) -> None:
        self.class_weights = class_weights
        if class_weights is not None and not (class_weights and all(0 < weight < math.inf for weight in class_weights)):
            raise SlzoError(f"data.objective.class_weights {class_weights}: give a number above 0 for each candidate")

    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        table = by_example(scores, batch)
        if self.class_weights is None:
            total = F.cross_entropy(table, batch.gold, reduction="sum", ignore_index=-1)
            return LossSum(total, (batch.gold >= 0).sum().to(total.dtype))
        if len(self.class_weights) != batch.most_candidates:
            raise SlzoError(
                f"data.objective.class_weights {self.class_weights}: the task has {batch.most_candidates} candidates; give "
                "one weight for each"
            )
        weights = torch.tensor(self.class_weights, dtype=table.dtype).to(table.device, non_blocking=True)
        total = F.cross_entropy(table, batch.gold, weights, reduction="sum", ignore_index=-1)
        return LossSum(total, (weights[batch.gold.clamp(min=0)] * (batch.gold >= 0)).sum())
