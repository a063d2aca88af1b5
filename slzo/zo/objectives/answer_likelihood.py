"""Negative log-likelihood of the gold answer."""

from torch import Tensor

from slzo.batches.losses import RowLosses, answer_losses
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import LogitObjective


class AnswerLikelihood(LogitObjective):
    """Negative log-likelihood of the gold answer's tokens, averaged over all of the batch: COPA, SQuAD, DROP (MeZO)."""

    only_gold = True

    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        return answer_losses(logits, batch)
