"""Cross-entropy over the candidates' scores."""

from torch import Tensor

from slzo.batches.losses import LossSum, candidate_cross_entropy
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import CandidateObjective


class CandidateCrossEntropy(CandidateObjective):
    """Cross-entropy over the candidates' scores: the loss of classification tasks (MeZO)."""

    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        return candidate_cross_entropy(scores, batch)
