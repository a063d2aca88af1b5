"""1 - accuracy of the best candidate."""

from torch import Tensor

from slzo.batches.losses import LossSum, candidate_errors
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import CandidateObjective


class CandidateErrors(CandidateObjective):
    """1 - accuracy of the best candidate: no gradient exists, and zeroth-order steps need none."""

    differentiable = False

    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        return candidate_errors(scores, batch)
