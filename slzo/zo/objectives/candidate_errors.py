"""1 - accuracy of the best candidate."""

from torch import Tensor

from slzo.batches.losses import LossSum, RowLosses, by_example
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import CandidateObjective


class CandidateErrors(CandidateObjective):
    """1 - accuracy of the best candidate over labelled examples: no gradient exists, and zeroth-order steps need none."""

    differentiable = False

    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        return self.of_row_scores(scores, batch).sum()

    def of_row_scores(self, scores: Tensor, batch: PackedBatch) -> RowLosses:
        best = by_example(scores, batch).argmax(dim=-1)
        hits = by_example(batch.right.to(scores.dtype), batch).clamp(min=0)
        labelled = (hits.sum(dim=-1) > 0).to(scores.dtype)
        hit = hits.expand(*best.shape, -1).gather(-1, best[..., None])[..., 0]
        return RowLosses(labelled - hit, labelled)
