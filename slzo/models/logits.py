"""Logits at the positions where they are needed; the last layer runs only for the tokens that these depend on."""

from torch import Tensor, searchsorted

from slzo.batches.packing import PackedBatch
from slzo.models.last_tokens_attention import LastTokensAttention
from slzo.models.parts import ModelParts
from slzo.models.placement import placement_of, visit
from slzo.models.recorded import keys_and_values, run_with

# With a larger share of last tokens it takes longer to compute their queries, keys and values twice.
_LARGEST_SHARE = 0.5


def needed_logits(
    parts: ModelParts, batch: PackedBatch, start: int = 0, hidden: Tensor | None = None, token_ids: Tensor | None = None
) -> Tensor:
    """Run layer ``start`` and all above; return the logits at the needed positions, see :meth:`ModelParts.head`.

    Args:
        parts: The model.
        batch: The batch.
        start: The first layer.
        hidden: States that enter it, shape (T, hidden); not needed for ``start == 0``.
        token_ids: Tokens to compute logits for, shape (K,); ``None`` for the whole vocabulary.

    Returns:
        Shape (U, K or vocabulary), float32.
    """
    return parts.head(final_states(parts, batch, start, hidden)[0], token_ids)


def runs_last_tokens(parts: ModelParts) -> bool:
    """Return whether layers of a model can run for the last tokens of each sequence, with recorded keys and values."""
    placement = placement_of(parts.model)
    return parts.packed and parts.virtual_tokens is None and not (placement is not None and placement.elsewhere)


def final_states(
    parts: ModelParts, batch: PackedBatch, start: int, hidden: Tensor | None, num_points: int = 1
) -> Tensor:
    """Run layer ``start`` and all above; return the final states at the needed positions.

    In the last layer, tokens before the first needed position of their sequence have only their keys and values computed.

    Args:
        parts: The model.
        batch: The batch.
        start: The first layer.
        hidden: States that enter it at N points, one after the other, shape (N T, hidden); not needed for ``start == 0``.
        num_points: N.

    Returns:
        Shape (N, U, hidden).
    """
    tokens, stop = batch if num_points == 1 else batch.repeat(num_points), parts.num_layers
    if start == stop or not runs_last_tokens(parts) or _needs_most(batch):
        final = parts.run(tokens, start, stop, hidden).unflatten(0, (num_points, -1))
        return final.index_select(1, batch.needed)
    last = stop - 1
    entering = hidden if start == last and hidden is not None else parts.run(tokens, start, last, hidden)
    chosen = batch.last_tokens.repeat(num_points, batch.num_tokens)
    with visit(parts.model, last):
        attention = LastTokensAttention(chosen, keys_and_values(parts, tokens, last, stop, entering), 1)
        own = tokens.at(chosen.positions)
        final = run_with(parts, own, attention.attend, last, stop, entering.index_select(0, chosen.positions))
    number = searchsorted(batch.last_tokens.positions, batch.needed)
    return final.unflatten(0, (num_points, -1)).index_select(1, number)


def _needs_most(batch: PackedBatch) -> bool:
    return len(batch.last_tokens.positions) > _LARGEST_SHARE * batch.num_tokens
