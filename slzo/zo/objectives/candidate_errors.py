"""1 - accuracy of the best candidate."""

import math

from torch import Tensor

from slzo.batches.losses import RowLosses, by_example
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import CandidateObjective


class CandidateErrors(CandidateObjective):
    """1 - accuracy of the best candidate over labelled examples: no gradient exists, and zeroth-order steps need none."""

    differentiable = False

    def losses_from_scores(self, scores: Tensor, batch: PackedBatch) -> RowLosses:
        by_row = by_example(scores, batch)
        best = by_row.argmax(dim=-1)
        hits = by_example(batch.right.to(scores.dtype), batch).clamp(min=0)
        labelled = (hits.sum(dim=-1) > 0).to(scores.dtype)
        hit = hits.expand(*best.shape, -1).gather(-1, best[..., None])[..., 0]
        broken = by_row.isnan().any(dim=-1)  # a NaN would count as the best candidate
        return RowLosses((labelled - hit).masked_fill(broken, math.nan), labelled)
