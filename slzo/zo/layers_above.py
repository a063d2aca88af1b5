"""Run layers at several points for the last tokens of each sequence, with the keys and values of all earlier tokens.

If the points differ only in the states of the last tokens, those of the earlier ones are the same at all points: a token never
attends to later ones. So the layers run over all tokens once, and then over the last tokens once for each point.

Shapes: ``T`` packed tokens, ``K`` last tokens, ``N`` points, ``U`` needed positions.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.packing import PackedBatch
from slzo.models.key_value_capture import can_run_last_tokens, compute_key_values, run_with_key_values
from slzo.models.last_tokens_attention import LastTokensAttention
from slzo.models.logits import states_at_needed
from slzo.models.parts import ModelParts
from slzo.zo.factored import FactoredGradient, factored_vjp
from slzo.zo.tuned import TunedTensors


class LayersAbove(NamedTuple):
    """The layers above the tuned one, run at several points for one batch.

    Attributes:
        positions: Packed positions of the tokens that run at each point, shape (K,), int64, rising.
        final: Final states of these tokens without any change, shape (K, hidden).
        run: Returns the final states, shape (N, K, hidden), from states that enter the layers, shape (N, K, hidden).
    """

    positions: Tensor
    final: Tensor
    run: Callable[[Tensor], Tensor]


def layers_above(parts: ModelParts, start: int, batch: PackedBatch, hidden: Tensor) -> LayersAbove:
    """Return the layers from ``start`` on for a batch. If possible, only the last tokens of each sequence run at each point.

    ``hidden`` are the states that enter layer ``start``, shape (T, hidden); only those of needed positions may change.
    """
    stop = parts.num_layers
    if not can_run_last_tokens(parts):

        def over_all_tokens(entering: Tensor) -> Tensor:
            final = parts.run(batch.repeat(len(entering)), start, stop, entering.flatten(0, 1))
            return final.unflatten(0, (len(entering), -1))

        positions = torch.arange(batch.num_tokens, device=hidden.device)
        return LayersAbove(positions, parts.run(batch, start, stop, hidden), over_all_tokens)

    last, final = batch.last_tokens, None
    # one more pass would read or gather all weights once more, unless they stay
    if parts.placement.offloads and stop - start > parts.placement.num_kept:
        states_after, states = run_with_key_values(parts, batch, start, stop, hidden)
        final = states_after[last.positions]
    else:
        states = compute_key_values(parts, batch, start, stop, hidden)
    attend = LastTokensAttention(last, states).attend

    def over_last_tokens(entering: Tensor) -> Tensor:
        points = len(entering)
        tokens = batch.tokens_at(last.positions, points)
        final = parts.run(tokens, start, stop, entering.flatten(0, 1), attend=attend)
        return final.unflatten(0, (points, -1))

    if final is None:
        final = over_last_tokens(hidden[last.positions][None])[0]
    return LayersAbove(last.positions, final, over_last_tokens)


def layers_vjp(
    parts: ModelParts, tuned: TunedTensors, start: int, stop: int, batch: PackedBatch, entering: Tensor
) -> tuple[Tensor, Callable[[Tensor], FactoredGradient]]:
    """Run layers; return their output and, for the needed positions, the transpose of its derivative.

    The derivative is taken through the last tokens of each sequence alone, to which the others contribute keys and values.
    ``tuned`` are the masters of some of the layers' tensors; the live weights must equal them. ``entering`` are the states that
    enter layer ``start``, shape (T, hidden).

    Returns:
        The output, shape (T, hidden), detached; for the last layer of the model it is 0 where no logits are needed. And a
        function that can be called once, from the gradient with respect to the output at the needed positions, shape (U,
        hidden), to the gradient of the masters.
    """
    run = partial(parts.run, batch, start, stop, entering, norm=False)
    if not can_run_last_tokens(parts):
        output, vjp_fn = factored_vjp(tuned, run)

        def from_needed(gradient: Tensor) -> FactoredGradient:
            of_output = torch.zeros_like(output)
            of_output[:, : gradient.shape[1]].index_copy_(0, batch.logit_positions, gradient)
            return vjp_fn(of_output)

        return output, from_needed

    width = entering.shape[1] - parts.extra_columns(start)

    def at_needed() -> Tensor:
        return states_at_needed(parts, batch, start, stop, entering, norm=False)[0][:, :width]

    if stop == parts.num_layers:  # only the head reads the output, at the needed positions
        found, vjp_fn = factored_vjp(tuned, at_needed)
        return torch.zeros_like(entering[:, :width]).index_copy_(0, batch.logit_positions, found), vjp_fn
    return run(), lambda gradient: factored_vjp(tuned, at_needed)[1](gradient)
