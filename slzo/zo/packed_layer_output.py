"""The output of the tuned layer for a packed batch, and the loss as a function of it."""

from typing import NamedTuple

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss, RowLosses, check_positions, checked_row_losses
from slzo.batches.packing import PackedBatch
from slzo.models.logits import last_layer_share
from slzo.models.parts import ModelParts
from slzo.models.quantization import is_plain
from slzo.utils.errors import SlzoError
from slzo.zo.forward import Span, SuffixForward
from slzo.zo.head_directions import head_directions, tokens_of_positions
from slzo.zo.layer_output import LayerOutput, rms
from slzo.zo.layers_above import LayersAbove, layers_above
from slzo.zo.likely_tokens import LikelyTokens

# Several points run together until they have this many tokens: small matrix products leave a processor idle.
_FEWEST_TOKENS = 640
# Logits of the whole vocabulary take more memory than anything else, so only this many are computed together.
_FEWEST_LOGITS = 4_000_000
# In half precision a shift along a direction has at least this share of the size of what the layer adds.
_LEAST_OF_ADDED = 0.015
# It has at most this share of the size of the state, which a norm scales.
_MOST_OF_STATE = 0.1
# A layer that adds nothing to a token still gets noise: this share of the token's state, or this size.
_LEAST_SHARE, _LEAST = 1e-3, 1e-12
# In half precision rounding would hide the noise of a layer that adds little: its size counts as this many roundings at least.
_LEAST_ROUNDINGS = 20


def check_layer_output(parts: ModelParts, span: Span, estimator: str) -> None:
    """Check that an estimator, given by name, can perturb the output of the tuned layer.

    Raises:
        SlzoError: Not exactly one layer is tuned, or the loss of a row depends on the other rows of its batch.
    """
    if not span.inside or span.stop - span.start != 1 or parts.virtual_tokens is not None:
        tuned = (
            f"layers {span.start} to {span.stop - 1} are" if span.inside else "tensors outside the decoder layers are"
        )
        raise SlzoError(
            f"model.estimator {estimator}: perturbs the output of one layer, and {tuned} tuned; use a scope of one "
            "layer (LayerScope, OutlierChannels, ActivationSubspace, LoRA), or SPSA"
        )
    config = getattr(parts.model.config, "quantization_config", None)
    if getattr(config, "load_in_8bit", False):
        raise SlzoError(
            f"model.estimator {estimator}: with LLM.int8 (load_in_8bit) the loss of a row depends on the other rows "
            "of its batch; use model.quantization int8, nf4 or none, or SPSA"
        )


class PackedLayerOutput(LayerOutput):
    """The output of the tuned layer for a packed batch. Only the layers above run at a shifted output.

    Args:
        forward: The model and its tuned layer.
        batch: The rows, T tokens.
        entered: States that enter the tuned layer, shape (T, width), with their extra columns.
        output: Its output at the masters, in the same way.
        objective: The loss as a function of logits.
        max_tokens: Run at most this many tokens at once, but always those of one point; ``None`` for no limit.
        checks: Check the losses of positions, which waits for a GPU.

    Attributes:
        sums: Total loss and weight at the masters, shape (2,).
    """

    def __init__(
        self,
        forward: SuffixForward,
        batch: PackedBatch,
        entered: Tensor,
        output: Tensor,
        objective: LogitLoss,
        max_tokens: int | None = None,
        checks: bool = True,
    ) -> None:
        upper, start = forward.parts_above, forward.span.stop
        unshifted = _run_unshifted(upper, start, batch, output if upper is forward.parts else output.float(), objective)
        if unshifted.whole_vocabulary and upper is not forward.parts:  # in float32 it would take a copy of the head
            unshifted = _run_unshifted(forward.parts, start, batch, output, objective)
        found, output = unshifted.losses, unshifted.output
        if checks and not unshifted.selected:
            check_positions(objective, found, batch)
        is_linear = unshifted.objective is not objective
        per_token = is_linear or (found.by_position is not None and not unshifted.selected)

        self._forward, self._batch, self._unshifted = forward, batch, unshifted
        width = output.shape[1] - forward.parts.extra_columns(start)
        self._here = here = output[batch.logit_positions, :width]
        self.sums = found.sum()
        self.keys, self.counts, self.width = batch.example_index, batch.num_logits, width
        self.size = _size_of_added(entered[batch.logit_positions, :width], here)
        self.per_token = per_token
        self.term = torch.arange(len(batch.logit_positions), device=output.device) if per_token else batch.logit_example
        self.num_layers_above = unshifted.parts.num_layers - forward.span.stop
        self.compares_candidates = unshifted.selected or is_linear
        self.whole_vocabulary = unshifted.whole_vocabulary
        self.points_at_once = unshifted.points_at_once(batch, max_tokens)

    def evaluations(self, num_points: int) -> float:
        """Return the cost of an estimate from a number of points, as forward passes of the batch from the tuned layer on."""
        parts, above = self._forward.parts, self.num_layers_above
        share = self._unshifted.above.positions.numel() / self._batch.num_tokens
        # layers that all tokens run through, in a forward pass of the batch; keys and values alone are not counted
        whole_pass = parts.num_layers - self._forward.span.start - 1 + last_layer_share(parts, self._batch)
        # a derivative costs about two passes; if not all tokens run at each point, it goes through those that do
        at_masters: float = 3 + above
        if share < 1:
            at_masters = 3 * share + (above > 0) + max(0, above - 1) + share * above
        return at_masters / whole_pass + num_points * (share * above / whole_pass)

    def token_shifts(self, number: int, change: float) -> Tensor | None:
        weight = self._forward.parts.model.get_output_embeddings().weight
        if not is_plain(weight) or weight.shape[1] != self.width:  # rows of a quantized head cannot be read
            return None
        tokens = tokens_of_positions(self._batch, None if self._unshifted.selected else self._unshifted.logits, number)
        states = self._here.float()
        directions, sensitivity = head_directions(weight, self._forward.final_norm, states, tokens)
        size = rms(states)
        distance = (change * size / sensitivity).clamp(max=_MOST_OF_STATE * self.width**0.5 * size)
        if self._unshifted.output.dtype != torch.float32:
            # rounding would hide a smaller shift
            distance = distance.clamp(min=_LEAST_OF_ADDED * self.width**0.5 * self.size)
        return directions * torch.where(sensitivity > 0, distance, 0)

    def losses(self, shifts: Tensor) -> Tensor:
        unshifted = self._unshifted
        hidden = unshifted.output[unshifted.above.positions].repeat(len(shifts), 1, 1)
        hidden[:, unshifted.logit_index, : self.width] = self._moved(shifts)
        found = self._row_losses(self._logits(unshifted.above.run(hidden)))
        return found.by_position if self.per_token and found.by_position is not None else found.totals

    def applied(self, shifts: Tensor) -> Tensor:
        return shifts if self._here.dtype == torch.float32 else self._moved(shifts).float() - self._here.float()

    def _moved(self, shifts: Tensor) -> Tensor:
        return (self._here.float() + shifts).to(self._here.dtype)

    def _row_losses(self, logits: Tensor) -> RowLosses:
        unshifted = self._unshifted
        batch = self._batch if unshifted.likely is None else unshifted.likely.batch
        return checked_row_losses(unshifted.objective, logits, batch, unshifted.selected)

    def _logits(self, final: Tensor) -> Tensor:
        """Return the logits of the needed positions at N points, from final states of shape (N, K, width)."""
        unshifted = self._unshifted
        needed, head = final[:, unshifted.logit_index], unshifted.parts.head
        if unshifted.likely is not None:
            return unshifted.likely.logits(needed, head)
        ids = self._batch.choice_ids if unshifted.selected else None
        return head(needed.flatten(0, 1), ids).unflatten(0, needed.shape[:2])


class _Unshifted(NamedTuple):
    """What is computed without a shift.

    Attributes:
        parts: The model whose layers above run, as in :attr:`SuffixForward.parts_above`.
        output: The output of the tuned layer in the dtype of these layers, shape (T, width).
        above: The layers above.
        logit_index: Places of the positions with logits among the tokens that run at each point, shape (U,).
        logits: Logits at these positions, shape (U, K or vocabulary), float32.
        losses: Losses of the rows.
        objective: The loss at the points, up to a constant: to first order where that is a sum over positions.
        selected: Whether only logits of the candidates' tokens are computed.
        likely: Likely tokens, whose logits are computed at each point; ``None`` for the candidates or the whole vocabulary.
    """

    parts: ModelParts
    output: Tensor
    above: LayersAbove
    logit_index: Tensor
    logits: Tensor
    losses: RowLosses
    objective: LogitLoss
    selected: bool
    likely: LikelyTokens | None

    @property
    def whole_vocabulary(self) -> bool:
        """Whether logits of the whole vocabulary are computed at each point."""
        return not self.selected and self.likely is None

    def points_at_once(self, batch: PackedBatch, max_tokens: int | None) -> int:
        """Return how many points run together; for ``max_tokens`` see :class:`PackedLayerOutput`."""
        most = max(batch.num_tokens, _FEWEST_TOKENS) if max_tokens is None else max_tokens
        points = max(1, most // len(self.above.positions))
        if self.selected:  # logits take little memory
            return points
        computed = len(batch.logit_positions) * (self.logits if self.likely is None else self.likely.ids).shape[1]
        return min(points, max(computed, _FEWEST_LOGITS) // computed)


def _run_unshifted(
    parts: ModelParts, start: int, batch: PackedBatch, output: Tensor, objective: LogitLoss
) -> _Unshifted:
    """Run layers ``start`` and above without a shift, from the tuned layer's output in their dtype, shape (T, width)."""
    above = layers_above(parts, start, batch, output)
    needed = torch.searchsorted(above.positions, batch.logit_positions)
    selected = not objective.needs_vocabulary(batch)
    logits = parts.head(above.final[needed], batch.choice_ids if selected else None)
    losses = checked_row_losses(objective, logits[None], batch, selected)
    linear = None if selected or losses.by_position is not None else objective.linearized(logits, batch)
    likely = None
    if not selected and losses.likelihood_temperature is not None:
        likely = LikelyTokens.of(logits, batch, losses.likelihood_temperature)
    return _Unshifted(parts, output, above, needed, logits, losses, linear or objective, selected, likely)


def _size_of_added(entered: Tensor, output: Tensor) -> Tensor:
    """Return the root mean square of what a layer adds to states, see :attr:`LayerOutput.size`, or the least that counts."""
    here = output.float()
    least = max(_LEAST_SHARE, _LEAST_ROUNDINGS * torch.finfo(output.dtype).eps)
    return torch.maximum(rms(here - entered.float()), least * rms(here)).clamp(min=_LEAST)
