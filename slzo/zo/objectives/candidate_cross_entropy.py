"""Cross-entropy over the candidates' scores."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from slzo.batches.losses import RowLosses, by_example
from slzo.batches.packing import PackedBatch
from slzo.tasks.base import Example
from slzo.utils.errors import SlzoError
from slzo.zo.objectives.base import CandidateObjective


class CandidateCrossEntropy(CandidateObjective):
    """Cross-entropy over the candidates' scores, averaged over labelled examples: the loss of classification tasks (MeZO).

    Args:
        class_weights: Weight of the rows of each candidate, in the candidates' order, for classes of unequal size; by
            default all rows count the same. The mean is over the weights. They also apply to dev and held-out losses.

    Raises:
        SlzoError: A weight is not a number above 0.
    """

    def __init__(self, class_weights: list[float] | None = None) -> None:
        self.class_weights = class_weights
        if class_weights is not None and not (
            len(class_weights) and all(0 < each < math.inf for each in class_weights)
        ):
            raise SlzoError(f"data.objective.class_weights {class_weights}: give a number above 0 for each candidate")

    def losses_from_scores(self, scores: Tensor, batch: PackedBatch) -> RowLosses:
        table, labelled = by_example(scores, batch), batch.gold >= 0
        gold = batch.gold.expand(table.shape[:-1])
        weights = None
        if self.class_weights is not None:
            weights = torch.tensor(self.class_weights, dtype=table.dtype).to(table.device, non_blocking=True)
        losses = F.cross_entropy(table.flatten(0, -2), gold.flatten(), weights, reduction="none", ignore_index=-1)
        of_row = labelled.to(table.dtype) if weights is None else weights[batch.gold.clamp(min=0)] * labelled
        return RowLosses(losses.view_as(gold), of_row)

    def check_examples(self, examples: Sequence[Example]) -> None:
        if self.class_weights is None:
            return
        for example in examples:
            if len(example.candidates) != len(self.class_weights):
                raise SlzoError(
                    f"data.objective.class_weights {self.class_weights}: {example.location} has {len(example.candidates)} "
                    "candidates; give one weight for each"
                )
