"""Candidate scores and losses from logits at the answer positions.

``...`` in a shape stands for any number of dimensions: the batch may be evaluated at several points at once.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch


class LossSum(NamedTuple):
    """A total loss and the weight to divide it by, both 0-dimensional float32. Sums of batches or processes can be added."""

    total: Tensor
    weight: Tensor


class RowLosses(NamedTuple):
    """What each example adds to a :class:`LossSum`: totals, shape (..., B), and weights, shape (B,), both float32."""

    totals: Tensor
    weights: Tensor

    def sum(self) -> LossSum:
        """Return the sums over the examples; the totals must be those of one point."""
        return LossSum(self.totals.sum(), self.weights.sum())


class LogitLoss(Protocol):
    """A loss as a function of logits, such as any :class:`slzo.zo.objectives.LogitObjective`."""

    @property
    def likelihood_temperature(self) -> float | None:
        """The temperature, usually 1, if logits of the whole vocabulary are only read by :func:`token_log_likelihoods`.

        Then the vocabulary may be another one, in which ``batch.token_id`` has the places of the answer tokens. ``None`` if the
        loss reads logits itself.
        """

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        """Return whether the loss needs the logits of the whole vocabulary, or only those of ``batch.choice_ids``."""

    def row_losses(self, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
        """Return the loss of each example.

        Args:
            logits: Logits of the needed positions, float32, shape (..., U, K) for ``batch.choice_ids`` if ``selected``, else
                (..., U, vocabulary).
            batch: The batch.
            selected: Whether only the logits of ``batch.choice_ids`` are given.
        """

    def position_losses(self, logits: Tensor, batch: PackedBatch) -> Tensor | None:
        """Return what the logits of each needed position add to the total loss, shape (..., U).

        ``None`` if the loss is not a sum over positions. ``logits`` are those of the whole vocabulary.
        """


def token_log_likelihoods(logits: Tensor, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each answer token, shape (..., R), from float32 logits (..., U, vocabulary).

    The probability of a token is the softmax of logits / temperature.
    """
    if temperature != 1:
        logits = logits / temperature
    chosen = logits[..., batch.token_needed, batch.token_id]
    return chosen - logits.logsumexp(dim=-1)[..., batch.token_needed]


def candidate_scores(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Return the mean log-likelihood of each candidate's tokens, shape (..., C), from logits (..., U, vocabulary)."""
    tokens = token_log_likelihoods(logits, batch)
    total = tokens.new_zeros(*tokens.shape[:-1], batch.candidate_length.numel())
    return total.index_add_(-1, batch.token_candidate, tokens) / batch.candidate_length


def by_example(scores: Tensor, batch: PackedBatch) -> Tensor:
    """Arrange scores (..., C) by example, shape (..., B, most candidates), padded with minus infinity."""
    table = scores.new_full((*scores.shape[:-1], batch.num_examples, batch.most_candidates), float("-inf"))
    table[..., batch.candidate_example, batch.candidate_slot] = scores
    return table


def answer_losses(logits: Tensor, batch: PackedBatch) -> RowLosses:
    """Return the negative log-likelihood of the gold answers, summed over their tokens, from logits (..., U, vocabulary)."""
    tokens = -token_log_likelihoods(logits, batch)
    mask = _is_gold(batch).to(tokens.dtype)
    example = batch.candidate_example[batch.token_candidate]
    totals = tokens.new_zeros(*tokens.shape[:-1], batch.num_examples).index_add_(-1, example, tokens * mask)
    return RowLosses(totals, mask.new_zeros(batch.num_examples).index_add_(0, example, mask))


def position_losses(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Return the negative log-likelihood of the gold tokens that follow each needed position, shape (..., U).

    The logits have shape (..., U, vocabulary).
    """
    tokens = -token_log_likelihoods(logits, batch)
    totals = tokens.new_zeros(*tokens.shape[:-1], batch.needed.numel())
    return totals.index_add_(-1, batch.token_needed, tokens * _is_gold(batch).to(tokens.dtype))


def _is_gold(batch: PackedBatch) -> Tensor:
    """Return whether each answer token is one of the gold answer, shape (R,)."""
    return (batch.candidate_slot == batch.gold[batch.candidate_example])[batch.token_candidate]


def answer_loss(logits: Tensor, batch: PackedBatch) -> LossSum:
    """Return the sum of :func:`answer_losses` over the examples, from logits (U, vocabulary)."""
    return answer_losses(logits, batch).sum()


def sum_losses(sums: Sequence[LossSum]) -> LossSum:
    """Return the sum of one or more loss sums."""
    return LossSum(*(torch.stack(parts).sum() for parts in zip(*sums, strict=True)))


def stack(sums: Sequence[LossSum]) -> Tensor:
    """Stack the totals and weights of P >= 1 evaluations, shape (2, P)."""
    return torch.stack([torch.stack(parts) for parts in zip(*sums, strict=True)])


def no_loss(device: torch.device) -> LossSum:
    """Return the loss of a batch without rows: total 0, weight 0."""
    zero = torch.zeros((), device=device)
    return LossSum(zero, zero)
