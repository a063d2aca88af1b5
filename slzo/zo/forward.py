"""The loss of a batch with the prefix computed once and only the needed logits."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss, LossSum, no_loss, stack
from slzo.batches.packing import PackedBatch
from slzo.models.arrival import Arrival
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.zo.estimators.base import Point, RowShare
from slzo.zo.tuned import TunedTensors


class Span(NamedTuple):
    """The layers that hold tuned tensors.

    Attributes:
        start: First of them; the layers before it are the prefix.
        stop: One past the last of them.
        inside: Whether no tensor outside of the decoder layers (embeddings, final norm, head) is tuned.
    """

    start: int
    stop: int
    inside: bool = True

    @classmethod
    def of(cls, parts: ModelParts, tuned: TunedTensors) -> Self:
        """The layers of a model that some tensors belong to."""
        owner = {id(tensor): index for index, layer in enumerate(parts.layers) for tensor in layer.parameters()}
        layers = {owner.get(id(tensor.live), -1) for _, tensor in tuned.items()}
        if -1 in layers:
            return cls(0, parts.num_layers, inside=False)
        return cls(min(layers), max(layers) + 1)


# Up to this many tokens both evaluations in one batch take less time than two batches: weights are read, and by oneDNN packed,
# once. Above, the matrix products fill the processor either way. CPU: measured on one Zen 5 core with SmolLM2-135M (38 tokens
# 0.75 of the time, 112 tokens 0.89, 220 tokens 0.97, 600 tokens 1.0). Accelerators take far more tokens to fill; not measured.
_PAIR_TOKENS = {"cpu": 320}
_PAIR_TOKENS_ACCELERATOR = 8192


@dataclass(eq=False)
class SuffixForward:
    """Runs the layers from the first tuned one up.

    Attributes:
        parts: The model.
        span: The layers that hold tuned tensors.
        cache: Where the states that enter the first of them are kept between steps.
        candidate_logits: Compute only the candidates' logits where the loss allows it.
        paired: Run the layers above the tuned ones for all points in one batch; ``None`` does so for small batches.
    """

    parts: ModelParts
    span: Span
    cache: PrefixCache
    candidate_logits: bool = True
    paired: bool | None = None

    @property
    def decodes_together(self) -> bool:
        """Whether answers at several points can be generated together: some layers are the same at all of them."""
        span, parts = self.span, self.parts
        some = span.inside and (span.start > 0 or span.stop < parts.num_layers)
        return some and parts.packed and not parts.compile and parts.virtual_tokens is None

    @torch.no_grad()
    def prefix(self, batch: PackedBatch, keep: bool = True, max_tokens: int | None = None) -> Tensor | None:
        """Hidden states that enter the first tuned layer, shape (T, hidden); ``None`` if there is no layer before it.

        Only examples that the cache does not hold are run; their states are offered to it with ``keep``. Those that it plans to
        keep are run with the others of their block. With ``max_tokens`` no more than these go through the layers at once; the
        examples must not share tokens then.
        """
        states = self.fetch(batch, keep, max_tokens)
        return None if states is None else states.wait()

    @torch.no_grad()
    def fetch(self, batch: PackedBatch, keep: bool = True, max_tokens: int | None = None) -> Arrival | None:
        """The same, to be waited for when they are needed: a card copies kept states while it does something else."""
        if self.span.start == 0:
            return None
        return self.cache.states_of(
            batch, lambda part: self.parts.run(part, 0, self.span.start), self.parts.model.dtype, keep, max_tokens
        )

    def logits(self, batch: PackedBatch, hidden: Tensor | None, token_ids: Tensor | None = None) -> Tensor:
        """Logits at the needed positions with the live weights, shape (U, K or vocabulary), float32."""
        return self.parts.logits(batch, self.span.start, hidden, token_ids)

    def loss(self, batch: PackedBatch, hidden: Tensor | None, objective: LogitLoss) -> LossSum:
        """The loss with the live weights, summed; arguments as for :meth:`losses`. Gradients may flow."""
        selected = self.selects(objective, batch)
        logits = self.logits(batch, hidden, batch.choice_ids if selected else None)
        return objective.of_logits(logits, batch, selected)

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
        """Totals and what to divide them by of each point's rows, shape (2, P), float32; the live weights stay at the last point.

        ``hidden`` is what :meth:`prefix` returned for the batch; for the points see :class:`slzo.zo.estimators.base.Loss`. A
        batch of more than ``max_tokens`` is run in parts: losses are sums over rows.
        """
        shares, pieces = points[0].rows.of, batch.cut(max_tokens)
        if len(pieces) > 1 and shares == 1:
            given = zip(pieces, _split(hidden, pieces), strict=True)
            return sum(self.losses(p, h, tuned, points, objective, max_tokens) for p, h in given)  # type: ignore[return-value]
        if len(pieces) > 1:
            divided = batch.divide(shares)
            inputs = _split(hidden, divided)
            found = []
            for point in points:
                rows, states = divided[point.rows.number], inputs[point.rows.number]
                found.append(self._share_losses(rows, states, tuned, point, objective, max_tokens))
            return torch.cat(found, dim=1)
        divided = batch.divide(shares)
        copies = [points[start : start + len(divided)] for start in range(0, len(points), len(divided))]
        inputs = _split(hidden, divided)
        inner = self.span.inside and self.span.stop < self.parts.num_layers
        paired = self._pairs(batch, len(copies), max_tokens)
        if inner and (paired or len(divided) > 1):
            runs = [copies] if paired else [[copy] for copy in copies]
            found = [self._joined_losses(batch, divided, inputs, tuned, run, objective) for run in runs]
            return torch.cat(found, dim=1)
        sums = []
        for point in points:
            rows = divided[point.rows.number]
            if rows is None:
                sums.append(no_loss(batch.input_ids.device))
                continue
            tuned.write(point.direction, point.scale)
            sums.append(self.loss(rows, inputs[point.rows.number], objective))
        return stack(sums)

    def _share_losses(
        self,
        rows: PackedBatch | None,
        hidden: Tensor | None,
        tuned: TunedTensors,
        point: Point,
        objective: LogitLoss,
        max_tokens: int | None,
    ) -> Tensor:
        """The same at one point, on the rows of its share alone; shape (2, 1)."""
        if rows is None:
            return stack([no_loss(tuned.masters[0].device)])
        return self.losses(rows, hidden, tuned, [point._replace(rows=RowShare())], objective, max_tokens)

    def selects(self, objective: LogitLoss, batch: PackedBatch) -> bool:
        """Whether only the candidates' logits are computed."""
        return self.candidate_logits and not objective.needs_vocabulary(batch)

    def _pairs(self, batch: PackedBatch, num_copies: int, max_tokens: int | None) -> bool:
        if num_copies == 1:
            return False
        if max_tokens is not None and num_copies * batch.num_tokens > max_tokens:
            return False
        if self.paired is not None:
            return self.paired
        return batch.num_tokens <= _PAIR_TOKENS.get(batch.input_ids.device.type, _PAIR_TOKENS_ACCELERATOR)

    def _joined_losses(
        self,
        batch: PackedBatch,
        divided: Sequence[PackedBatch | None],
        inputs: Sequence[Tensor | None],
        tuned: TunedTensors,
        copies: Sequence[Sequence[Point]],
        objective: LogitLoss,
    ) -> Tensor:
        """The same with one run of the layers above the tuned ones, over as many copies of the batch as each part has points."""
        points = [point for copy in copies for point in copy]
        output = self._one_by_one(divided, inputs, tuned, points)
        repeated = batch.repeat(len(copies)) if len(copies) > 1 else batch
        final = self.parts.run(repeated, self.span.stop, self.parts.num_layers, output)
        selected = self.selects(objective, batch)
        token_ids = batch.choice_ids if selected else None
        num_needed = [0 if rows is None else rows.needed.numel() for rows in divided]
        sums = []
        for states in final.split(batch.num_tokens):
            logits = self.parts.head(states.index_select(0, batch.needed), token_ids).split(num_needed)
            for rows, own in zip(divided, logits, strict=True):
                sums.append(no_loss(own.device) if rows is None else objective.of_logits(own, rows, selected))
        return stack(sums)

    def _one_by_one(
        self,
        divided: Sequence[PackedBatch | None],
        inputs: Sequence[Tensor | None],
        tuned: TunedTensors,
        points: Sequence[Point],
    ) -> Tensor:
        """States after the tuned layers at each point in turn, on its rows."""
        outputs = []
        for point in points:
            rows = divided[point.rows.number]
            if rows is not None:
                tuned.write(point.direction, point.scale)
                outputs.append(self.parts.run(rows, self.span.start, self.span.stop, inputs[point.rows.number]))
        return torch.cat(outputs)


def _split(hidden: Tensor | None, parts: Sequence[PackedBatch | None]) -> Sequence[Tensor | None]:
    """The hidden states of each part of a batch."""
    if hidden is None:
        return [None] * len(parts)
    return hidden.split([0 if part is None else part.num_tokens for part in parts])
