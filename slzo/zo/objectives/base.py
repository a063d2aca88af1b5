"""Base classes of objectives: losses of training rows as a function of logits or of generated answers."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from slzo.batches.losses import LossSum, RowLosses, candidate_scores
from slzo.batches.packing import PackedBatch
from slzo.data.batch import TrainBatch
from slzo.tasks.base import Example
from slzo.utils.errors import broken_contract, shown
from slzo.zo.estimators.base import Loss
from slzo.zo.loss import BatchAnswerLoss, BatchLogitLoss, LossContext
from slzo.zo.policy_gradient import AnswerSampling


class Objective(ABC):
    """A loss that training minimizes.

    Most objectives derive from :class:`LogitObjective`, :class:`CandidateObjective` or :class:`AnswerObjective`.

    Attributes:
        only_gold: Whether training rows contain only the gold answer, without the other candidates.
        generates: Whether training rows contain a prompt from which an answer is generated.
        differentiable: Whether estimators of a gradient can be used: the loss has a derivative with respect to the logits, or it
            is a loss of generated answers, which has a policy gradient.
        needs_label: Whether rows without a label cannot be used and are left out.
        sampling: How answers are sampled for a policy gradient; objectives that generate none ignore it.
        lowest: Lower bound of the loss. Automatic step sizes of SPSA are relative to the distance from it.
        selected_by: Value on the dev rows that selects a checkpoint and that the guard watches: "loss", the loss of the gold
            answer; "reward", which needs ``data.reward``; or a metric of the task such as "f1", whose best value is 1.
    """

    only_gold: bool = False
    generates: bool = False
    differentiable: bool = True
    needs_label: bool = True
    lowest: float = 0.0
    sampling: AnswerSampling = AnswerSampling()
    selected_by: str = "loss"

    @abstractmethod
    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        """Return the loss of a batch as a function of the tuned tensors."""

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
        raise broken_contract("data.objective", objective, f"loss() returned {shown(loss)}", "a Loss")
    return loss


def _checked_sum(objective: Objective, method: str, found: object) -> LossSum:
    """Return what a method returned, or raise SlzoError if it is not a total and its weight."""
    if (
        isinstance(found, tuple)
        and len(found) == len(LossSum._fields)
        and all(isinstance(part, Tensor) and part.dim() == 0 for part in found)
    ):
        return LossSum(*found)
    wanted = "a LossSum of two 0-dimensional tensors: the total loss of the batch, and the weight to divide it by"
    raise broken_contract("data.objective", objective, f"{method}() returned {shown(found)}", wanted)


def _one_by_one(
    loss: Callable[[Tensor, PackedBatch], LossSum],
    values: Tensor,
    batch: PackedBatch,
    size: Callable[[PackedBatch], int],
) -> RowLosses:
    """Call ``loss`` with the values of each example at each point; ``size`` is how many an example has."""
    examples = batch.cut(1)  # one token at most, so each example is separate
    sizes = [size(example) for example in examples]
    of_points = [[loss(*own) for own in zip(point.split(sizes), examples, strict=True)] for point in values]
    totals = torch.stack([torch.stack([sums.total for sums in point]) for point in of_points])
    return RowLosses(totals, torch.stack([sums.weight for sums in of_points[0]]))


def _scores(logits: Tensor, batch: PackedBatch, selected: bool) -> Tensor:
    """Return the score of each candidate, shape (..., C)."""
    return logits[..., batch.token_needed, batch.token_choice] if selected else candidate_scores(logits, batch)


def _later(objective: Objective, name: str, other: str) -> bool:
    """Return whether a method is overridden by a subclass of the class that defines ``other``, which then knows nothing of it."""
    classes = type(objective).__mro__
    first, second = (next(n for n, kind in enumerate(classes) if each in vars(kind)) for each in (name, other))
    return first < second


@dataclass(frozen=True)
class _CheckedLoss:
    """The loss of an objective as a function of logits, with a check of what it returns."""

    objective: "LogitObjective"

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        return self.objective.needs_vocabulary(batch)

    def likelihood_temperature(self) -> float | None:
        names = ("of_logits", "of_rows", "of_positions")
        own = any(_later(self.objective, name, "likelihood_temperature") for name in names)
        return None if own else self.objective.likelihood_temperature()

    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        return _checked_sum(self.objective, "of_logits", self.objective.of_logits(logits, batch, selected))

    def of_rows(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        objective = self.objective
        of_rows = (
            partial(LogitObjective.of_rows, objective)
            if _later(objective, "of_logits", "of_rows")
            else objective.of_rows
        )
        losses = of_rows(logits, batch, selected)
        shapes = (len(logits), batch.num_examples), (batch.num_examples,)
        if not isinstance(losses, RowLosses) or tuple(part.shape for part in losses) != shapes:
            wanted = "RowLosses with a total for each point and example, and a weight for each example"
            raise broken_contract("data.objective", self.objective, f"of_rows() returned {shown(losses)}", wanted)
        return losses

    def of_positions(self, logits: Tensor, batch: PackedBatch) -> Tensor | None:
        if any(_later(self.objective, name, "of_positions") for name in ("of_logits", "of_rows")):
            return None
        losses = self.objective.of_positions(logits, batch)
        if losses is not None and (not isinstance(losses, Tensor) or losses.shape != logits.shape[:-1]):
            wanted = "None, or a loss for each point and position"
            raise broken_contract("data.objective", self.objective, f"of_positions() returned {shown(losses)}", wanted)
        return losses


class LogitObjective(Objective):
    """A loss of the logits at the answers' positions. It uses the prefix cache."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        """Return whether the loss needs the logits of the whole vocabulary, or only those of ``batch.choice_ids``."""
        return True

    def likelihood_temperature(self) -> float | None:
        """Return the temperature if logits are only read as likelihoods, see :class:`slzo.batches.losses.LogitLoss`.

        ``None`` by default.
        """
        return None

    @abstractmethod
    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        """Return the loss of a batch; for the arguments see :class:`slzo.batches.losses.LogitLoss`."""

    def of_rows(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        """Return the loss of each example, see :class:`slzo.batches.losses.LogitLoss`.

        By default :meth:`of_logits` is called for each example and point. Override it if one call can do all.
        """

        def loss(own: Tensor, example: PackedBatch) -> LossSum:
            return _checked_sum(self, "of_logits", self.of_logits(own, example, selected))

        return _one_by_one(loss, logits, batch, lambda example: example.needed.numel())

    def of_positions(self, logits: Tensor, batch: PackedBatch) -> Tensor | None:
        """Return what each position adds to the loss, see :class:`slzo.batches.losses.LogitLoss`. ``None`` by default."""
        return None

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        states = context.forward.fetch(batch.packed, max_tokens=batch.max_tokens)
        return BatchLogitLoss(context, batch, _CheckedLoss(self), states)


class CandidateObjective(LogitObjective):
    """A loss of the candidates' scores."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        # the normalizer over the vocabulary cancels between one-token candidates of the same prompt
        return batch.choice_ids is None

    def likelihood_temperature(self) -> float:
        return 1.0

    @abstractmethod
    def of_scores(self, scores: Tensor, batch: PackedBatch) -> LossSum:
        """Return the loss of a batch.

        Args:
            scores: Mean log-likelihood of each candidate's tokens, shape (C,), float32; up to a constant for each example.
            batch: The batch. It holds the example and the slot of each candidate, and which candidates are right.
        """

    def of_row_scores(self, scores: Tensor, batch: PackedBatch) -> RowLosses:
        """Return the loss of each example from scores of shape (N, C) at N points.

        By default :meth:`of_scores` is called for each example and point. Override it if one call can do all.
        """

        def loss(own: Tensor, example: PackedBatch) -> LossSum:
            return _checked_sum(self, "of_scores", self.of_scores(own, example))

        return _one_by_one(loss, scores, batch, lambda example: example.candidate_length.numel())

    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        return _checked_sum(self, "of_scores", self.of_scores(_scores(logits, batch, selected), batch))

    def of_rows(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        scores = _scores(logits, batch, selected)
        if _later(self, "of_scores", "of_row_scores"):
            return CandidateObjective.of_row_scores(self, scores, batch)
        return self.of_row_scores(scores, batch)


class AnswerObjective(Objective):
    """A loss of generated answers, computed from their texts."""

    only_gold = True
    generates = True

    @abstractmethod
    def answer_losses(self, answers: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
        """Return the loss of each answer to the prompt of its example."""

    def loss(self, batch: TrainBatch, context: LossContext) -> Loss:
        return BatchAnswerLoss(context, batch, self.sampling, AnswerSampling(1, 0.0), self._checked_losses)

    def _checked_losses(self, answers: Sequence[str], examples: Sequence[Example]) -> Sequence[float]:
        losses = self.answer_losses(answers, examples)
        try:
            numbers = [float(loss) for loss in losses]
        except (TypeError, ValueError):
            numbers = []
        if len(numbers) != len(answers):
            wanted = f"a number for each of the {len(answers)} answers"
            raise broken_contract("data.objective", self, f"answer_losses() returned {shown(losses)}", wanted)
        return numbers
