"""Candidate scores and losses from logits at the answer positions.

``...`` in a shape stands for any number of dimensions: the batch may be evaluated at several points at once. The loss of a batch
is a tensor of shape (2, ...), float32: its total and the weight to divide it by. Those of batches or processes can be added.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.utils.errors import broken_contract, short_repr


class RowLosses(NamedTuple):
    """What each example adds to total loss and weight.

    Attributes:
        totals: What each example adds to the total loss, shape (..., B), float32.
        weights: Weight of each example, shape (B,), float32.
        by_position: What the logits of each needed position add to the total loss, shape (..., U), float32. ``None`` if the loss
            is not a sum over positions.
        likelihood_temperature: The temperature, usually 1, if logits of the whole vocabulary were only read by
            :func:`token_log_likelihoods`. Then the vocabulary may be another one, in which ``batch.token_id`` has the places of
            the answer tokens. ``None`` if the loss reads logits itself.
    """

    totals: Tensor
    weights: Tensor
    by_position: Tensor | None = None
    likelihood_temperature: float | None = None

    def sum(self) -> Tensor:
        """Return total loss and weight, shape (2,), float32; the totals must be those of one point."""
        return torch.stack([self.totals.sum(), self.weights.sum()])


class LogitLoss(ABC):
    """A loss as a function of logits."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        """Return whether the loss needs the logits of the whole vocabulary, or only those of ``batch.choice_ids``."""
        return True

    @abstractmethod
    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        """Return the loss of each example.

        Args:
            logits: Logits of the needed positions, float32, shape (..., U, K) for ``batch.choice_ids`` if ``selected``, else
                (..., U, vocabulary).
            batch: The batch.
            selected: Whether only the logits of ``batch.choice_ids`` are given.
        """

    def linearized(self, logits: Tensor, batch: PackedBatch) -> "LogitLoss | None":
        """Return a sum over positions whose derivative at these logits is that of the loss; ``None`` if there is none.

        The logits are those of the whole vocabulary, float32, shape (U, vocabulary).
        """
        return None


def checked(loss: LogitLoss, method: str, found: object, points: torch.Size, batch: PackedBatch) -> RowLosses:
    """Return what a method returned, or raise SlzoError if it is not a loss and a weight for each example."""
    shapes = (*points, batch.num_examples), (batch.num_examples,)
    if not (
        isinstance(found, RowLosses)
        and all(isinstance(each, Tensor) for each in found[:2])
        and (found.totals.shape, found.weights.shape) == shapes
        and found.totals.device == found.weights.device == batch.gold.device
    ):
        wanted = (
            "RowLosses with a total for each point and example, and a weight for each example, as tensors on "
            f"{batch.gold.device}"
        )
        raise broken_contract("data.objective", loss, f"{method}() returned {short_repr(found)}", wanted)
    found = found._replace(totals=found.totals.float(), weights=found.weights.float())
    own = found.by_position
    if own is not None and (not isinstance(own, Tensor) or own.shape != (*points, batch.logit_positions.numel())):
        wanted = "RowLosses whose by_position is None, or a loss for each point and position"
        raise broken_contract("data.objective", loss, f"{method}() returned by_position {short_repr(own)}", wanted)
    return found


def checked_row_losses(loss: LogitLoss, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
    """Return :meth:`LogitLoss.row_losses`, or raise SlzoError if they are wrong."""
    return checked(loss, "row_losses", loss.row_losses(logits, batch, selected), logits.shape[:-2], batch)


def check_positions(loss: LogitLoss, found: RowLosses, batch: PackedBatch) -> None:
    """Raise SlzoError if ``by_position`` does not add up to the totals, such as those that a subclass has changed."""
    if found.by_position is None:
        return
    sums = torch.zeros_like(found.totals).index_add_(-1, batch.logit_example, found.by_position)
    if not torch.allclose(sums, found.totals, rtol=1e-3, atol=1e-3, equal_nan=True):
        wanted = "new RowLosses, without by_position if the loss is not a sum over positions"
        returned = "row_losses() returned by_position that does not add up to totals"
        raise broken_contract("data.objective", loss, returned, wanted)


def token_log_likelihoods(logits: Tensor, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each answer token, shape (..., R), from float32 logits (..., U, vocabulary).

    The probability of a token is the softmax of logits / temperature.
    """
    if temperature != 1:
        logits = logits / temperature
    chosen = logits[..., batch.token_logit, batch.token_id]
    return chosen - logits.logsumexp(dim=-1)[..., batch.token_logit]


def candidate_scores(logits: Tensor, batch: PackedBatch, selected: bool = False) -> Tensor:
    """Return the mean log-likelihood of each candidate's tokens, shape (..., C), from logits (..., U, vocabulary).

    If ``selected``, the logits are those of ``batch.choice_ids``, and the result is up to a constant for each example.
    """
    if selected:
        return logits[..., batch.token_logit, batch.token_choice]
    return mean_by_candidate(token_log_likelihoods(logits, batch), batch)


def mean_by_candidate(tokens: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean over the tokens of each candidate, shape (..., C), from (..., R)."""
    total = tokens.new_zeros(*tokens.shape[:-1], batch.candidate_length.numel())
    return total.index_add_(-1, batch.token_candidate, tokens) / batch.candidate_length


def by_example(scores: Tensor, batch: PackedBatch) -> Tensor:
    """Arrange scores (..., C) by example, shape (..., B, most candidates), padded with minus infinity."""
    table = scores.new_full((*scores.shape[:-1], batch.num_examples, batch.most_candidates), float("-inf"))
    table[..., batch.candidate_example, batch.candidate_slot] = scores
    return table


def sum_by_example(tokens: Tensor, batch: PackedBatch) -> Tensor:
    """Return the sum over the answer tokens of each example, shape (..., B), from (..., R)."""
    totals = tokens.new_zeros(*tokens.shape[:-1], batch.num_examples)
    return totals.index_add_(-1, batch.candidate_example[batch.token_candidate], tokens)


def sum_by_position(tokens: Tensor, batch: PackedBatch) -> Tensor:
    """Return the sum over the answer tokens that follow each needed position, shape (..., U), from (..., R)."""
    totals = tokens.new_zeros(*tokens.shape[:-1], batch.logit_positions.numel())
    return totals.index_add_(-1, batch.token_logit, tokens)


def answer_losses(logits: Tensor, batch: PackedBatch) -> RowLosses:
    """Return the negative log-likelihood of the gold answers, summed over their tokens, from logits (..., U, vocabulary)."""
    is_gold = (batch.candidate_slot == batch.gold[batch.candidate_example])[batch.token_candidate].float()
    tokens = -token_log_likelihoods(logits, batch) * is_gold
    return RowLosses(
        sum_by_example(tokens, batch),
        sum_by_example(is_gold, batch),
        sum_by_position(tokens, batch),
        likelihood_temperature=1.0,
    )


class FirstOrderLoss(LogitLoss):
    """A loss of the candidates' scores, to first order in these: a sum over positions, up to a constant for each example.

    An example with one needed position has its own loss instead, as in a batch whose candidates all have one token.

    Args:
        of_scores: Returns the loss from the scores, shape (..., C).
        slopes: Derivative of the total loss with respect to the score of each candidate, shape (C,), float32.
        batch: The batch.
    """

    def __init__(
        self, of_scores: Callable[[Tensor, PackedBatch], RowLosses], slopes: Tensor, batch: PackedBatch
    ) -> None:
        self._of_scores, self._slopes = of_scores, slopes
        self._alone: Tensor | None = None
        if 1 in batch.num_logits:
            alone = torch.tensor([number == 1 for number in batch.num_logits])
            self._alone = alone.to(slopes.device, non_blocking=True)[batch.logit_example]

    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        """See :meth:`LogitLoss.row_losses`; the weights are 1."""
        tokens = token_log_likelihoods(logits, batch)
        of_token = (self._slopes / batch.candidate_length)[batch.token_candidate]
        by_position = sum_by_position(tokens * of_token, batch)
        if self._alone is not None:
            totals = self._of_scores(mean_by_candidate(tokens, batch), batch).totals
            by_position = torch.where(self._alone, totals[..., batch.logit_example], by_position)
        totals = by_position.new_zeros(*by_position.shape[:-1], batch.num_examples)
        totals.index_add_(-1, batch.logit_example, by_position)
        return RowLosses(totals, totals.new_ones(batch.num_examples), by_position, likelihood_temperature=1.0)
