"""What an objective is: the loss of training rows as a function of logits or of generated answers."""

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
    """What training minimizes. Most are a :class:`LogitObjective`, a :class:`CandidateObjective` or an :class:`AnswerObjective`.

    Attributes:
        only_gold: Training rows hold the gold answer only, not the other candidates.
        generates: Training rows hold a prompt to generate an answer from.
        differentiable: Whether it has a derivative by the logits; estimators that differentiate need one.
        needs_label: Whether rows without a label are of no use; they are left out then.
        lowest: The lowest loss there can be, which step sizes measure the distance to.
    """

    only_gold: bool = False
    generates: bool = False
    differentiable: bool = True
    needs_label: bool = True
    lowest: float = 0.0

    @abstractmethod
    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        """The loss of a batch as a function of what is tuned."""

    def describe(self) -> str:
        """In a few words; equal for equal objectives."""
        return type(self).__name__


class LogitObjective(Objective):
    """A loss of the logits at the answers' positions; it runs with the prefix cached."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        """Whether it needs the whole vocabulary's logits, or only those of ``batch.choice_ids``."""
        return True

    @abstractmethod
    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        """The loss of a batch, see :class:`slzo.batches.losses.LogitLoss` for the arguments."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return BatchLogitLoss(context, batch, self, context.forward.fetch(batch.packed, max_tokens=batch.max_tokens))


class CandidateObjective(LogitObjective):
    """A loss of the candidates' scores."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        # between candidates of one token after one prompt the vocabulary's normalizer cancels
        return batch.choice_ids is None

    @abstractmethod
    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        """The loss of a batch from the mean log-likelihood of each candidate's tokens, shape (C,), float32.

        The scores of an example are up to a constant; the batch says which candidates belong together and which are right.
        """

    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        scores = logits[batch.token_needed, batch.token_choice] if selected else candidate_scores(logits, batch)
        return self.of_scores(scores, batch)


class AnswerObjective(Objective):
    """A loss of generated answers: anything that can be computed from texts."""

    only_gold = True
    generates = True
    differentiable = False

    @abstractmethod
    def of_answers(self, answers: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
        """The loss of each answer to its example's prompt."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return BatchAnswerLoss(context, batch, self.of_answers)
