"""Candidate scores and losses from logits at the answer positions."""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch


class LossSum(NamedTuple):
    """A sum and what to divide it by, both 0-dimensional float32, so that processes can be added up."""

    total: Tensor
    weight: Tensor


class LogitLoss(Protocol):
    """A loss as a function of logits; every :class:`slzo.zo.objectives.LogitObjective` is one."""

    def needs_vocabulary(self, batch: PackedBatch) -> bool:
        """Whether it needs the whole vocabulary's logits, or only those of ``batch.choice_ids``."""

    def of_logits(self, logits: Tensor, batch: PackedBatch, selected: bool) -> LossSum:
        """The loss of a batch from float32 logits, shape (U, K) of ``batch.choice_ids`` if ``selected``, else (U, vocabulary)."""


def token_log_likelihoods(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Log-probability of each answer token, shape (R,), from full-vocabulary logits (U, vocabulary) in float32."""
    return logits[batch.token_needed, batch.token_id] - logits.logsumexp(dim=-1)[batch.token_needed]


def candidate_scores(logits: Tensor, batch: PackedBatch) -> Tensor:
    """Mean log-likelihood of each candidate's tokens given the prompt, shape (C,), from logits (U, vocabulary)."""
    tokens = token_log_likelihoods(logits, batch)
    total = tokens.new_zeros(batch.candidate_length.shape).index_add_(0, batch.token_candidate, tokens)
    return total / batch.candidate_length


def by_example(scores: Tensor, batch: PackedBatch) -> Tensor:
    """Scores (C,) as a matrix, one example a row, shape (B, most candidates), filled up with minus infinity."""
    table = scores.new_full((batch.num_examples, batch.most_candidates), float("-inf"))
    table[batch.candidate_example, batch.candidate_slot] = scores
    return table


def answer_loss(logits: Tensor, batch: PackedBatch) -> LossSum:
    """Negative log-likelihood of the gold answers' tokens, summed over tokens, from logits (U, vocabulary)."""
    tokens = token_log_likelihoods(logits, batch)
    is_gold = batch.candidate_slot == batch.gold[batch.candidate_example]
    mask = is_gold[batch.token_candidate].to(tokens.dtype)
    return LossSum(-(tokens * mask).sum(), mask.sum())


def add_up(sums: Sequence[LossSum]) -> LossSum:
    """The sum of at least one."""
    return LossSum(*(torch.stack(parts).sum() for parts in zip(*sums, strict=True)))


def stack(sums: Sequence[LossSum]) -> Tensor:
    """Totals and weights of at least one evaluation, shape (2, P)."""
    return torch.stack([torch.stack(parts) for parts in zip(*sums, strict=True)])


def no_loss(device: torch.device) -> LossSum:
    """The loss of no rows."""
    zero = torch.zeros((), device=device)
    return LossSum(zero, zero)
