"""Cross-entropy over the candidates' scores."""

from torch import Tensor
from torch.nn import functional as F

from slzo.batches.losses import LossSum, by_example
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import CandidateObjective


class CandidateCrossEntropy(CandidateObjective):
    """Cross-entropy over the candidates' scores, summed over labelled examples: the loss of classification tasks (MeZO)."""

    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        total = F.cross_entropy(by_example(scores, batch), batch.gold, reduction="sum", ignore_index=-1)
        return LossSum(total, (batch.gold >= 0).sum().to(total.dtype))
