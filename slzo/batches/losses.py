"""Candidate scores and losses from logits at the answer positions.

``...`` in a shape stands for any number of dimensions: the batch may be evaluated at several points at once. The loss of a batch
is a tensor of shape (2, ...), float32: its total and the weight to divide it by. Those of batches or processes can be added.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.utils.errors import broken_contract, shown


class RowLosses(NamedTuple):
    """What each example adds to total loss and weight: totals, shape (..., B), and weights, shape (B,), both float32."""

    totals: Tensor
    weights: Tensor

    def sum(self) -> Tensor:
        """Return total loss and weight, shape (2,), float32; the totals must be those of one point."""
        return torch.stack([self.totals.sum(), self.weights.sum()])


class LogitLoss(ABC):
    """A loss as a function of logits.

    Attributes:
        likelihood_temperature: The temperature, usually 1, if logits of the whole vocabulary are only read by
            :func:`token_log_likelihoods`. Then the vocabulary may be another one, in which ``batch.token_id`` has the places of
            the answer tokens. ``None`` if the loss reads logits itself.
    """

    likelihood_temperature: float | None = None

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

    def position_losses(self, logits: Tensor, batch: PackedBatch) -> Tensor | None:
        """Return what the logits of each needed position add to the total loss, shape (..., U).

        ``None``, the default, if the loss is not a sum over positions. ``logits`` are those of the whole vocabulary.
        """
        return None


def checked(loss: LogitLoss, method: str, found: object, points: torch.Size, batch: PackedBatch) -> RowLosses:
    """Return what a method returned, or raise SlzoError if it is not a loss and a weight for each example."""
    shapes = (*points, batch.num_examples), (batch.num_examples,)
    if not isinstance(found, RowLosses) or tuple(part.shape for part in found) != shapes:
        wanted = "RowLosses with a total for each point and example, and a weight for each example"
        raise broken_contract("data.objective", loss, f"{method}() returned {shown(found)}", wanted)
    return found


def checked_row_losses(loss: LogitLoss, logits: Tensor, batch: PackedBatch, selected: bool) -> RowLosses:
    """Return :meth:`LogitLoss.row_losses`, or raise SlzoError if they are wrong."""
    return checked(loss, "row_losses", loss.row_losses(logits, batch, selected), logits.shape[:-2], batch)


def checked_position_losses(loss: LogitLoss, logits: Tensor, batch: PackedBatch) -> Tensor | None:
    """Return :meth:`LogitLoss.position_losses`, or raise SlzoError if they are wrong."""
    losses = loss.position_losses(logits, batch)
    if losses is not None and (not isinstance(losses, Tensor) or losses.shape != logits.shape[:-1]):
        wanted = "None, or a loss for each point and position"
        raise broken_contract("data.objective", loss, f"position_losses() returned {shown(losses)}", wanted)
    return losses


def token_log_likelihoods(logits: Tensor, batch: PackedBatch, temperature: float = 1.0) -> Tensor:
    """Return the log-probability of each answer token, shape (..., R), from float32 logits (..., U, vocabulary).

    The probability of a token is the softmax of logits / temperature.
    """
    if temperature != 1:
        logits = logits / temperature
    chosen = logits[..., batch.token_needed, batch.token_id]
    return chosen - logits.logsumexp(dim=-1)[..., batch.token_needed]


def candidate_scores(logits: Tensor, batch: PackedBatch, selected: bool = False) -> Tensor:
    """Return the mean log-likelihood of each candidate's tokens, shape (..., C), from logits (..., U, vocabulary).

    If ``selected``, the logits are those of ``batch.choice_ids``, and the result is up to a constant for each example.
    """
    if selected:
        return logits[..., batch.token_needed, batch.token_choice]
    tokens = token_log_likelihoods(logits, batch)
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
    totals = tokens.new_zeros(*tokens.shape[:-1], batch.needed.numel())
    return totals.index_add_(-1, batch.token_needed, tokens)


def answer_losses(logits: Tensor, batch: PackedBatch) -> RowLosses:
    """Return the negative log-likelihood of the gold answers, summed over their tokens, from logits (..., U, vocabulary)."""
    return RowLosses(sum_by_example(gold_losses(logits, batch), batch), sum_by_example(_is_gold(batch).float(), batch))


def gold_losses(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Return the negative log-likelihood of each answer token of the gold answers, 0 for other answers, shape (..., R)."""
    return -token_log_likelihoods(logits, batch) * _is_gold(batch).float()


def _is_gold(batch: PackedBatch) -> Tensor:
    """Return whether each answer token is one of the gold answer, shape (R,)."""
    return (batch.candidate_slot == batch.gold[batch.candidate_example])[batch.token_candidate]
