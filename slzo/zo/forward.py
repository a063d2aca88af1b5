"""The loss of a batch: the prefix is computed once, and only the needed logits are computed."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple, Self

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss, checked_row_losses
from slzo.batches.packing import PackedBatch
from slzo.models.final_norm import FinalNorm
from slzo.models.key_value_capture import can_run_last_tokens
from slzo.models.logits import final_states
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache, run_in_pieces
from slzo.models.quantization import is_plain
from slzo.zo.tuned import Point, TunedTensors


class Span(NamedTuple):
    """The layers that hold tuned tensors.

    Attributes:
        start: The first of these layers. The layers before it are the prefix.
        stop: One past the last of these layers.
        inside: Whether all tuned tensors are in decoder layers, and none in embeddings, final norm or head; otherwise the span
            is all layers.
    """

    start: int
    stop: int
    inside: bool = True

    @classmethod
    def of(cls, parts: ModelParts, tuned: TunedTensors) -> Self:
        """Return the layers of a model that hold the tuned tensors."""
        owner = {id(tensor): index for index, layer in enumerate(parts.layers) for tensor in layer.parameters()}
        layers = {owner.get(id(tensor.live), -1) for _, tensor in tuned.items()}
        if -1 in layers:
            return cls(0, parts.num_layers, inside=False)
        return cls(min(layers), max(layers) + 1)


MOST_FLOAT32 = 2
"""Most layers above the tuned one that get float32 copies in half precision."""

# Up to this many tokens, two evaluations in one batch take less time than in two batches: the weights are read, and packed by
# oneDNN, only once. With more tokens the matrix products fill the processor either way. The CPU's limit was measured on one Zen 5
# core with SmolLM2-135M: 38 tokens took 0.75 of the time, 112 tokens 0.89, 220 tokens 0.97, 600 tokens 1.0. Accelerators need far
# more tokens; their limit was not measured.
_PAIR_TOKENS = {"cpu": 320}
_PAIR_TOKENS_ACCELERATOR = 8192


@dataclass(eq=False)
class SuffixForward:
    """Runs the suffix of a model: the layers from the first tuned one on.

    Attributes:
        parts: The model.
        span: The layers that hold tuned tensors.
        cache: Keeps the hidden states that enter the first tuned layer between steps.
        paired: Run the layers above the tuned ones for all points in one batch; ``None`` does so for small batches.
    """

    parts: ModelParts
    span: Span
    cache: PrefixCache
    paired: bool | None = None

    @cached_property
    @torch.no_grad()
    def final_norm(self) -> FinalNorm:
        """How the final norm, which is not tuned, treats a state. It is measured once."""
        return FinalNorm.of(self.parts)

    @cached_property
    @torch.no_grad()
    def parts_above(self) -> ModelParts:
        """Runs the layers above the tuned ones at shifted outputs, in float32 if they are few: rounding hides small changes."""
        parts, above = self.parts, self.parts.layers[self.span.stop :]
        dtype = parts.model.dtype
        plain = all(is_plain(tensor) and tensor.dtype == dtype for tensor in above.parameters())
        can_be_copied = plain and parts.placement.runs_copies
        if dtype.itemsize > 2 or not can_be_copied or len(above) > MOST_FLOAT32 or not can_run_last_tokens(parts):
            return parts
        return parts.in_float32(self.span.stop)

    @property
    def decodes_together(self) -> bool:
        """Whether answers at several points can be generated together. This needs layers that are the same at all points."""
        span, parts = self.span, self.parts
        shares_layers = span.start > 0 or span.stop < parts.num_layers
        return shares_layers and parts.packed and parts.virtual_tokens is None

    @torch.no_grad()
    def prefix(self, batch: PackedBatch, keep: bool = True, max_tokens: int | None = None) -> Tensor | None:
        """Return the hidden states that enter the first tuned layer, shape (T, hidden); ``None`` if no layer is before it.

        Only examples that the cache does not hold are computed. An example that the cache plans to keep is computed together
        with the other examples of its block. ``keep`` offers new states to the cache. With ``max_tokens`` at most this many
        tokens run at once; the examples must not share tokens then.
        """
        if self.span.start == 0:
            return None
        return self.cache.get_or_compute(batch, lambda part: self.parts.run(part, 0, self.span.start), keep, max_tokens)

    @torch.no_grad()
    def compute_prefix(self, batch: PackedBatch, max_tokens: int | None) -> Tensor | None:
        """Like :meth:`prefix`, without the cache, for batches whose tokens are new in each step."""
        if self.span.start == 0:
            return None
        return run_in_pieces(lambda part: self.parts.run(part, 0, self.span.start), batch, max_tokens)

    def loss(self, batch: PackedBatch, hidden: Tensor | None, objective: LogitLoss) -> Tensor:
        """Return the summed loss with the live weights, and its weight, shape (2,), float32.

        Arguments as for :meth:`losses`; autograd works here.
        """
        return self._loss_of(final_states(self.parts, batch, self.span.start, hidden)[0], batch, objective)

    def _loss_of(self, final: Tensor, batch: PackedBatch, objective: LogitLoss) -> Tensor:
        selected = not objective.needs_vocabulary(batch)
        logits = self.parts.head(final, batch.choice_ids if selected else None)
        return checked_row_losses(objective, logits, batch, selected).sum()

    @torch.no_grad()
    def losses(
        self,
        batch: PackedBatch,
        hidden: Tensor | None,
        tuned: TunedTensors,
        points: Sequence[Point],
        objective: LogitLoss,
        max_tokens: int | None = None,
    ) -> Tensor:
        """Return the total loss at each of P points and the weight to divide it by, shape (2, P), float32.

        ``hidden`` is the result of :meth:`prefix` for the batch. Several points run at once only up to ``max_tokens`` tokens;
        ``None`` is no limit. The live weights stay at the last point.
        """
        if not self._pairs(batch, len(points), max_tokens):
            sums = []
            for point in points:
                tuned.write(point)
                sums.append(self.loss(batch, hidden, objective))
            return torch.stack(sums, dim=1)
        outputs = []
        for point in points:
            tuned.write(point)
            outputs.append(self.parts.run(batch, self.span.start, self.span.stop, hidden))
        final = final_states(self.parts, batch, self.span.stop, torch.cat(outputs), len(points))
        return torch.stack([self._loss_of(own, batch, objective) for own in final], dim=1)

    def _pairs(self, batch: PackedBatch, num_points: int, max_tokens: int | None) -> bool:
        """Return whether the layers above the tuned ones run once for all points."""
        if num_points == 1 or self.span.stop == self.parts.num_layers:
            return False
        if max_tokens is not None and num_points * batch.num_tokens > max_tokens:
            return False
        if self.paired is not None:
            return self.paired
        return batch.num_tokens <= _PAIR_TOKENS.get(batch.input_ids.device.type, _PAIR_TOKENS_ACCELERATOR)
