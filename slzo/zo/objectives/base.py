"""Base classes of objectives: losses of training rows as a function of logits or of generated answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

from torch import Tensor

from slzo.batches.losses import LossSum, candidate_scores
from slzo.batches.packing import PackedBatch
from slzo.data.batch import TrainBatch
from slzo.tasks.base import Example
from slzo.zo.estimators.base import Loss
from slzo.zo.loss import BatchAnswerLoss, BatchLogitLoss, LossContext


class Objective(ABC):
    """A loss that training minimizes.

    Most objectives derive from :class:`LogitObjective`, :class:`CandidateObjective` or :class:`AnswerObjective`.

    Attributes:
        only_gold: Whether training rows contain only the gold answer, without the other candidates.
        generates: Whether training rows contain a prompt from which an answer is generated.
        differentiable: Whether the loss has a derivative with respect to the logits, as some estimators need.
        needs_label: Whether rows without a label cannot be used and are left out.
        lowest: Lower bound of the loss. Measured step sizes are relative to the distance from it.
    """

    only_gold: bool = False
    generates: bool = False
    differentiable: bool = True
    needs_label: bool = True
    lowest: float = 0.0

    @abstractmethod
    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        """Return the loss of a batch as a function of the tuned tensors."""

    def describe(self) -> str:
        """Describe the objective in a few words. Equal objectives have equal descriptions."""
        return type(self).__name__


class LogitObjective(Objective):
    """A loss of the logits at the answers' positions. It uses the prefix cache."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        """Return whether the loss needs the logits of the whole vocabulary, or only those of ``batch.choice_ids``."""
        return True

    @abstractmethod
    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        """Return the loss of a batch; for the arguments see :class:`slzo.batches.losses.LogitLoss`."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return BatchLogitLoss(context, batch, self, context.forward.fetch(batch.packed, max_tokens=batch.max_tokens))


class CandidateObjective(LogitObjective):
    """A loss of the candidates' scores."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        # the normalizer over the vocabulary cancels between one-token candidates of the same prompt
        return batch.choice_ids is None

    @abstractmethod
    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        """Return the loss of a batch.

        Args:
            scores: Mean log-likelihood of each candidate's tokens, shape (C,), float32; up to a constant for each example.
            batch: The batch. It holds the example and the slot of each candidate, and which candidates are right.
        """

    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        scores = logits[batch.token_needed, batch.token_choice] if selected else candidate_scores(logits, batch)
        return self.of_scores(scores, batch)


class AnswerObjective(Objective):
    """A loss of generated answers, computed from their texts."""

    only_gold = True
    generates = True
    differentiable = False

    @abstractmethod
    def answer_losses(self, answers: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
        """Return the loss of each answer to the prompt of its example."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return BatchAnswerLoss(context, batch, self.answer_losses)
