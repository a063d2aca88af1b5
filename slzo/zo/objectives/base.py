"""Base classes of objectives: losses of training rows as a function of logits or of generated answers."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from slzo.batches.losses import FirstOrderLoss, LogitLoss, RowLosses, candidate_scores, checked
from slzo.batches.packing import PackedBatch
from slzo.data.batch import Row, TrainBatch
from slzo.evaluation.generation import Answer
from slzo.tasks.base import Example
from slzo.utils.argument_checks import ChecksOverrides
from slzo.utils.errors import broken_contract, short_repr
from slzo.zo.answer_loss import BatchAnswerLoss
from slzo.zo.batch_loss import LossContext
from slzo.zo.logit_loss import BatchLogitLoss
from slzo.zo.loss import Loss, LossReport
from slzo.zo.policy_gradient import AnswerSampling


class Objective(ChecksOverrides, ABC):
    """A loss that training minimizes.

    Most objectives derive from :class:`LogitObjective`, :class:`CandidateObjective` or :class:`AnswerObjective`.

    Attributes:
        only_gold: Whether training rows contain only the gold answer, without the other candidates.
        generates: Whether training rows contain a prompt from which an answer is generated; see :class:`GenerationObjective`.
        differentiable: Whether estimators of a gradient can be used: the loss has a derivative with respect to the logits, or it
            is a loss of generated answers, which has a policy gradient.
        needs_label: Whether rows without a label cannot be used and are left out.
        lowest: Lower bound of the loss. Automatic step sizes of SPSA are relative to the distance from it.
        selected_by: Value on the dev rows that selects a checkpoint and that the guard watches: "loss", the loss of the gold
            answer; "reward", which needs ``data.reward``; or a metric of the task such as "f1", whose best value is 1. A metric
            that the task does not report stands for the loss.
    """

    only_gold: bool = False
    generates: bool = False
    differentiable: bool = True
    needs_label: bool = True
    lowest: float = 0.0
    selected_by: str = "loss"

    @abstractmethod
    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        """Return the loss of a batch as a function of the tuned tensors."""

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Check the training rows before the model is loaded; by default all are accepted.

        Raises:
            SlzoError: The objective cannot be computed for a row.
        """

    def describe(self) -> str:
        """Describe the objective in a few words. Equal objectives have equal descriptions."""
        return type(self).__name__


def loss_of(objective: Objective, batch: TrainBatch, context: LossContext) -> Loss:
    """Return the loss of a batch as a function of the tuned tensors.

    Raises:
        SlzoError: The objective returns something else.
    """
    loss = objective.loss(batch, context)
    if not isinstance(loss, Loss):
        raise broken_contract("data.objective", objective, f"loss() returned {short_repr(loss)}", "a Loss")
    return loss


class LogitObjective(Objective, LogitLoss):
    """A loss of the logits at the answers' positions. It uses the prefix cache."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        states = context.forward.prefix(batch.packed, max_tokens=batch.max_tokens)
        return BatchLogitLoss(context, batch, self, states)


class CandidateObjective(LogitObjective):
    """A loss of the candidates' scores."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        # the normalizer over the vocabulary cancels between one-token candidates of the same prompt
        return batch.choice_ids is None

    @abstractmethod
    def losses_from_scores(self, scores: Tensor, batch: PackedBatch) -> RowLosses:
        """Return total and weight of each example.

        Args:
            scores: Mean log-likelihood of each candidate's tokens, shape (..., C), float32; up to a constant for each example.
            batch: The batch. It holds the example and the slot of each candidate, and which candidates are right.
        """

    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        losses = self.losses_from_scores(candidate_scores(logits, batch, selected), batch)
        totals, weights, *_ = checked(self, "losses_from_scores", losses, logits.shape[:-2], batch)
        return RowLosses(totals, weights, likelihood_temperature=1.0)

    def linearized(self, logits: Tensor, batch: PackedBatch) -> LogitLoss | None:
        # a subclass with its own row_losses has another loss than that of its losses_from_scores
        if not self.differentiable or type(self).row_losses is not CandidateObjective.row_losses:
            return None
        with torch.enable_grad():
            scores = candidate_scores(logits, batch).detach().requires_grad_()
            total = self.losses_from_scores(scores, batch).totals.sum()
            if not total.requires_grad:
                return None
            (slopes,) = torch.autograd.grad(total, scores)
        return FirstOrderLoss(self.losses_from_scores, slopes, batch)


class GenerationObjective(Objective):
    """A loss of generated answers.

    Attributes:
        sampling: How answers are sampled for a policy gradient.
        at_points: How answers are sampled at points around the masters; by default the likeliest tokens.
    """

    only_gold = True
    generates = True
    sampling: AnswerSampling = AnswerSampling()
    at_points: AnswerSampling = AnswerSampling(1, 0.0)

    @abstractmethod
    def losses_of(self, answers: Sequence[Answer], rows: Sequence[Row]) -> tuple[Sequence[float], LossReport]:
        """Return the loss of each answer, given with its row, and a report; NaN for all if one cannot be computed."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return BatchAnswerLoss(context, batch, self.sampling, self.at_points, self.losses_of)


class AnswerObjective(GenerationObjective):
    """A loss of the texts of generated answers."""

    @abstractmethod
    def answer_losses(self, answers: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
        """Return the loss of each answer to the prompt of its example."""

    def losses_of(self, answers: Sequence[Answer], rows: Sequence[Row]) -> tuple[Sequence[float], LossReport]:
        losses = self.answer_losses([answer.text for answer in answers], [row.example for row in rows])
        try:
            numbers = [float(loss) for loss in losses]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(answers):
            wanted = f"a number for each of the {len(answers)} answers"
            raise broken_contract("data.objective", self, f"answer_losses() returned {short_repr(losses)}", wanted)
        return numbers, LossReport()
