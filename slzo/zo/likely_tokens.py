"""The likely part of a vocabulary: logits of the other tokens are computed once, and then taken as constant."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch

# Tokens of a row whose logits are computed at every point, or its answer tokens if these are more.
NUM_LIKELY = 1024
# For a vocabulary below this multiple of them all logits are computed, because that is cheap.
_LEAST_MULTIPLE = 4


@dataclass(frozen=True)
class LikelyTokens:
    r"""For each row, the tokens with most of the probability at its needed positions, and its answer tokens.

    With :math:`z` the logits at a point, K the likely tokens and :math:`z^0` the logits without a shift,

    .. math:: \log p(y) \approx z_y - \log \Big( \sum_{v \in K} e^{z_v} + \sum_{v \notin K} e^{z^0_v} \Big)

    and so with logits divided by a temperature. This is exact without a shift. The derivative with respect to the logits is that
    of the softmax for the likely tokens, and 0 for the others. The tokens of a row do not depend on the other rows of its batch.

    Attributes:
        ids: The likely tokens of each row, shape (B, K), int64, rising.
        surplus: Which of them a row does not use, because another row has more answer tokens; ``None`` if all use all.
        rest: One logit for all other tokens without a shift, shape (U, 1), float32.
        batch: The batch with ``token_id`` as places in the ``ids`` of its row.
    """

    ids: Tensor
    surplus: Tensor | None
    rest: Tensor
    batch: PackedBatch

    @classmethod
    def of(cls, logits: Tensor, batch: PackedBatch, temperature: float = 1.0) -> Self | None:
        """Choose the likely tokens from logits without a shift, shape (U, vocabulary), which ``temperature`` divides.

        For a small vocabulary return ``None``.
        """
        vocabulary = logits.shape[1]
        if vocabulary < _LEAST_MULTIPLE * NUM_LIKELY:
            return None
        scaled, row = logits if temperature == 1 else logits / temperature, batch.logit_example
        likelihood = scaled.softmax(dim=1)
        score = likelihood.new_zeros(batch.num_examples, vocabulary).index_add_(0, row, likelihood)
        del scaled, likelihood  # as large as the logits
        token_row = row[batch.token_logit]
        score[token_row, batch.token_id] = torch.inf  # the answer tokens are always among them
        numbers = score.isinf().sum(dim=1, keepdim=True).clamp(min=NUM_LIKELY)
        most = max(NUM_LIKELY, _most_answer_tokens(batch.on_cpu))
        ids, order = score.topk(most, dim=1).indices.sort(dim=1)
        surplus = order >= numbers if most > NUM_LIKELY else None
        theirs = logits.new_full((len(row), most), -torch.inf)
        if surplus is not None:
            theirs = torch.where(surplus[row], logits.gather(1, ids[row]), theirs)
        rest = temperature * logits.scatter(1, ids[row], theirs).div_(temperature).logsumexp(dim=1, keepdim=True)
        places = torch.searchsorted(ids[token_row], batch.token_id[:, None])[:, 0]
        return cls(ids, surplus, rest, replace(batch, token_id=places, source=None))

    def logits(self, states: Tensor, head: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """Return logits of the likely tokens, and of the others as one more token, shape (N, U, K + 1), float32.

        Args:
            states: Final states at the needed positions, shape (N, U, width).
            head: Returns logits, float32, from states, shape (V, width), and ids of tokens, shape (K,).
        """
        found = self.rest.new_empty(*states.shape[:2], self.ids.shape[1] + 1)
        found[..., -1:] = self.rest
        last = 0
        for own, ids in zip(states.split(self.batch.num_logits, dim=1), self.ids, strict=True):
            first, last = last, last + own.shape[1]
            found[:, first:last, :-1] = head(own.flatten(0, 1), ids).unflatten(0, own.shape[:2])
        if self.surplus is not None:
            found[..., :-1].masked_fill_(self.surplus[self.batch.logit_example], -torch.inf)
        return found


def _most_answer_tokens(batch: PackedBatch) -> int:
    """Return the largest number of different answer tokens of an example."""
    example = batch.candidate_example[batch.token_candidate]
    different = torch.stack([example, batch.token_id]).unique(dim=1)
    return int(torch.bincount(different[0]).max())
