"""Negative log-likelihood of the gold answer."""

from torch import Tensor

from slzo.batches.losses import LossSum, RowLosses, answer_losses, position_losses
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import LogitObjective


class AnswerLikelihood(LogitObjective):
    """Negative log-likelihood of the gold answer's tokens, averaged over all of the batch: COPA, SQuAD, DROP (MeZO)."""

    only_gold = True

    def likelihood_temperature(self) -> float:
        return 1.0

    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        return self.of_rows(logits, batch, selected).sum()

    def of_rows(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        return answer_losses(logits, batch)

    def of_positions(self, logits: Tensor, batch: PackedBatch) -> Tensor:
        return position_losses(logits, batch)
