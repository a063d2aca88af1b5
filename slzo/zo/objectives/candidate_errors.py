"""1 - accuracy of the best candidate."""

from torch import Tensor

from slzo.batches.losses import LossSum, by_example
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import CandidateObjective


class CandidateErrors(CandidateObjective):
    """1 - accuracy of the best candidate over labelled examples: no gradient exists, and zeroth-order steps need none."""

    differentiable = False

    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        best = by_example(scores, batch).argmax(dim=1)
        hits = by_example(batch.right.to(scores.dtype), batch).clamp(min=0)
        labelled = (hits.sum(dim=1) > 0).to(scores.dtype)
        hit = hits.gather(1, best[:, None])[:, 0]
        return LossSum((labelled - hit).sum(), labelled.sum())
