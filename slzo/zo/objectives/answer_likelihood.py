"""Negative log-likelihood of the gold answer."""

from torch import Tensor

from slzo.batches.losses import RowLosses, answer_losses, gold_losses, sum_by_position
from slzo.batches.packing import PackedBatch
from slzo.zo.objectives.base import LogitObjective


class AnswerLikelihood(LogitObjective):
    """Negative log-likelihood of the gold answer's tokens, averaged over all of the batch: COPA, SQuAD, DROP (MeZO)."""

    only_gold = True
    likelihood_temperature = 1.0

    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        return answer_losses(logits, batch)

    def position_losses(self, logits: Tensor, batch: PackedBatch) -> Tensor:
        return sum_by_position(gold_losses(logits, batch), batch)
