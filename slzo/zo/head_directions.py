"""Directions of a layer's output along which the logits of a few tokens change most, from the rows of the head."""

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.models.final_norm import FinalNorm

# Directions shorter than this share of the longest one, after orthogonalization, are treated as rounding errors.
_LEAST_SHARE = 1e-4


def tokens_of_positions(batch: PackedBatch, logits: Tensor | None, number: int) -> Tensor:
    """Return the tokens whose logits count at each needed position, shape (U, M), int64; a row may repeat its first token.

    Args:
        batch: The batch. The tokens that its answers have at a position come first.
        logits: Logits of the whole vocabulary, shape (U, vocabulary), to add the ``number`` likeliest tokens. ``None`` if all
            rows have candidates of one token; then only these are used, as in such a row of any batch.
        number: Number of likely tokens.
    """
    own: list[list[int]] = [[] for _ in range(batch.logit_positions.numel())]
    answers = batch.on_cpu
    for position, token in zip(answers.token_logit.tolist(), answers.token_id.tolist(), strict=True):
        if token not in own[position]:
            own[position].append(token)
    if logits is not None:
        positions_of_row = [count for count in batch.num_logits for _ in range(count)]
        most_likely = logits.topk(min(number, logits.shape[1]), dim=1).indices.tolist()
        for tokens, likely, positions in zip(own, most_likely, positions_of_row, strict=True):
            if positions > 1 or len(tokens) == 1:
                tokens.extend(token for token in likely if token not in tokens)
    most = max(map(len, own))
    padded = [tokens + [tokens[0]] * (most - len(tokens)) for tokens in own]
    return torch.tensor(padded).to(batch.logit_positions.device, non_blocking=True)


def head_directions(weight: Tensor, norm: FinalNorm, states: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    r"""Return orthonormal directions in which differences between the logits of some tokens change.

    With :math:`w_v` the row of token v in the head, :math:`\gamma` the gain of the final norm and h the state, the derivative of
    the logit difference of v and u is along the part of :math:`\gamma \odot (w_v - w_u)` that is orthogonal to h, if the layers
    in between passed h on unchanged; means are subtracted if the norm does. In the last layer the gradient of a loss of these
    logits is a sum of the directions.

    Args:
        weight: Rows of the head, shape (vocabulary, width).
        norm: The final norm.
        states: States at the needed positions, shape (U, width), float32.
        tokens: Tokens of each position, shape (U, M); with M = 1 there are no directions.

    Returns:
        Directions of length 1, shape (K, U, width), 0 where a position has fewer than K; and by how much a logit difference
        changes per root mean square of h along each, shape (K, U, 1).
    """
    rows = weight[tokens].float()
    differences = norm.tangent(rows[:, 1:] - rows[:, :1], states)
    if differences.shape[1] == 0:
        return states.new_zeros(0, *states.shape), states.new_zeros(0, len(states), 1)
    basis, triangle = torch.linalg.qr(differences.transpose(1, 2))
    length = triangle.diagonal(dim1=1, dim2=2).abs()
    kept = length > _LEAST_SHARE * length.amax(dim=1, keepdim=True)
    return (basis * kept[:, None]).permute(2, 0, 1), (length * kept).T[..., None]
