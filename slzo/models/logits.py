"""Logits at the positions where they are needed; the last layer runs only for the tokens that these depend on."""

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.models.key_value_capture import can_run_last_tokens, compute_key_values
from slzo.models.last_tokens_attention import LastTokensAttention
from slzo.models.parts import ModelParts

# Queries, keys and values of the last tokens are computed twice. One layer of SmolLM2-135M takes 0.84 of the time with a share of
# 0.65, and 1.05 to 1.12 with 0.8 (one thread, rows of 32 and 128 tokens).
_LARGEST_SHARE = 0.7


def needed_logits(parts: ModelParts, batch: PackedBatch) -> Tensor:
    """Run a batch; return the logits at the needed positions, shape (U, vocabulary), float32."""
    return parts.head(final_states(parts, batch, 0, None)[0])


def last_layer_share(parts: ModelParts, batch: PackedBatch) -> float:
    """Return the share of a batch's tokens for which :func:`final_states` runs the last layer; 1 for all."""
    share = len(batch.last_tokens.positions) / batch.num_tokens
    return share if share <= _LARGEST_SHARE and can_run_last_tokens(parts) else 1.0


def final_states(
    parts: ModelParts, batch: PackedBatch, start: int, hidden: Tensor | None, num_points: int = 1
) -> Tensor:
    """Run layer ``start`` and all above; return the final states at the needed positions, shape (N, U, hidden).

    ``hidden`` are the states that enter it at N points, one after the other, shape (N T, hidden); not needed for layer 0. In the
    last layer, only keys and values are computed for the tokens before the first needed position of a sequence.
    """
    tokens, stop = batch.repeat(num_points), parts.num_layers
    if start == stop or last_layer_share(parts, batch) == 1:
        final = parts.run(tokens, start, stop, hidden).unflatten(0, (num_points, -1))
        return final.index_select(1, batch.logit_positions)
    last = stop - 1
    entering = hidden if start == last and hidden is not None else parts.run(tokens, start, last, hidden)
    with parts.placement.visit(last):
        return states_at_needed(parts, batch, last, stop, entering, num_points)


def states_at_needed(
    parts: ModelParts, batch: PackedBatch, start: int, stop: int, hidden: Tensor, num_points: int = 1, norm: bool = True
) -> Tensor:
    """Run layers for the last tokens of each sequence; return the states at the needed positions, shape (N, U, hidden).

    The other tokens contribute keys and values. The model must be one for which :func:`can_run_last_tokens` is true. For
    ``start``, ``stop`` and ``norm`` see :meth:`ModelParts.run`, for ``hidden`` :func:`final_states`.
    """
    last = batch.last_tokens
    chosen = last.repeat(num_points, batch.num_tokens)
    states = compute_key_values(parts, batch.repeat(num_points), start, stop, hidden)
    attend, own = LastTokensAttention(chosen, states).attend, batch.tokens_at(last.positions, num_points)
    after = parts.run(own, start, stop, hidden.index_select(0, chosen.positions), norm=norm, attend=attend)
    return after.unflatten(0, (num_points, -1)).index_select(
        1, torch.searchsorted(last.positions, batch.logit_positions)
    )
