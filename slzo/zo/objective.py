"""The loss of a batch as a function of the tuned layer alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slzo.evaluation.scoring import LossKind, needs_full_logits, stack, training_loss
from slzo.models.packing import PackedBatch
from slzo.models.prefix_cache import PrefixCache
from slzo.models.split import SplitModel
from slzo.zo.estimators import Point
from slzo.zo.tuned import TunedTensors


class LayerObjective:
    """Evaluates a batch with the prefix computed once and only the needed logits.

    Args:
        split: The model.
        layer: The tuned layer; the layers before it are the prefix.
        cache: Where prefix states are kept between steps.
        candidate_rows: Compute only the candidates' rows of the head where the loss allows it.
    """

    def __init__(self, split: SplitModel, layer: int, cache: PrefixCache, candidate_rows: bool = True) -> None:
        self.split = split
        self.layer = layer
        self.cache = cache
        self.candidate_rows = candidate_rows

    def prefix(self, batch: PackedBatch) -> Tensor | None:
        """Hidden states that enter the tuned layer, shape (T, hidden); ``None`` if it is the first layer."""
        if self.layer == 0:
            return None
        hidden = self.cache.get(batch.example_index, batch.input_ids.device)
        if hidden is None:
            hidden = self.split.run(batch, 0, self.layer)
            self.cache.put(batch.example_index, batch.example_tokens, hidden)
        return hidden

    def logits(self, batch: PackedBatch, hidden: Tensor | None, token_ids: Tensor | None = None) -> Tensor:
        """Logits at the needed positions with the live weights, shape (U, K or vocabulary), float32."""
        final = self.split.run(batch, self.layer, self.split.num_layers, hidden)
        return self.split.head(final.index_select(0, batch.rows), token_ids)

    @torch.no_grad()
    def losses(
        self, batch: PackedBatch, hidden: Tensor | None, tuned: TunedTensors, points: Sequence[Point], kind: LossKind
    ) -> Tensor:
        """Loss sums and counts at several points.

        Args:
            batch: The batch.
            hidden: What :meth:`prefix` returned for it.
            tuned: Writes each point into the live weights; they stay at the last one.
            points: Where to evaluate.
            kind: The loss.

        Returns:
            Shape (2, P), float32: totals and counts.
        """
        selected = self.candidate_rows and not needs_full_logits(kind, batch)
        sums = []
        for point in points:
            tuned.write(point.direction, point.scale)
            logits = self.logits(batch, hidden, batch.choice_ids if selected else None)
            sums.append(training_loss(kind, logits, batch, selected))
        return stack(sums)
