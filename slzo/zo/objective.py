"""The loss of a batch as a function of the tuned layer alone."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slzo.evaluation.scoring import LossKind, LossSum, needs_full_logits, stack, training_loss
from slzo.models.packing import PackedBatch
from slzo.models.prefix_cache import PrefixCache
from slzo.models.split import SplitModel
from slzo.zo.estimators import Point
from slzo.zo.tuned import TunedTensors

# Up to this many tokens both evaluations in one batch take less time than two batches: weights are read, and by oneDNN packed,
# once. Above, the matrix products fill the processor either way. CPU: measured on one Zen 5 core with SmolLM2-135M (38 tokens
# 0.75 of the time, 112 tokens 0.89, 220 tokens 0.97, 600 tokens 1.0). Accelerators take far more tokens to fill; not measured.
_PAIR_TOKENS = {"cpu": 320}
_PAIR_TOKENS_ACCELERATOR = 8192


class LayerObjective:
    """Evaluates a batch with the prefix computed once and only the needed logits.

    Args:
        split: The model.
        layer: The tuned layer; the layers before it are the prefix.
        cache: Where prefix states are kept between steps.
        candidate_rows: Compute only the candidates' rows of the head where the loss allows it.
        paired: Run the layers above the tuned one for all points in one batch; ``None`` does so for small batches.
    """

    def __init__(
        self,
        split: SplitModel,
        layer: int,
        cache: PrefixCache,
        candidate_rows: bool = True,
        paired: bool | None = None,
    ) -> None:
        self.split = split
        self.layer = layer
        self.cache = cache
        self.candidate_rows = candidate_rows
        self.paired = paired

    def prefix(self, batch: PackedBatch, keep: bool = True) -> Tensor | None:
        """Hidden states that enter the tuned layer, shape (T, hidden); ``None`` if it is the first layer.

        Only examples that the cache does not hold are run.

        Args:
            batch: The batch.
            keep: Offer new states to the cache; ``False`` only reads it.
        """
        if self.layer == 0:
            return None
        missing = [number for number, key in enumerate(batch.example_index) if key not in self.cache]
        if missing:
            part = batch if len(missing) == batch.num_examples else batch.select(missing)
            fresh = self.cache.round(self.split.run(part, 0, self.layer))
            lengths = [batch.example_tokens[number] for number in missing]
            if keep:
                self.cache.put([batch.example_index[number] for number in missing], lengths, fresh)
            if part is batch:
                return fresh
            new = dict(zip(missing, fresh.split(lengths), strict=True))
        else:
            new = {}
        return self.cache.gather(batch.example_index, new, batch.input_ids.device, self.split.model.dtype)

    def logits(self, batch: PackedBatch, hidden: Tensor | None, token_ids: Tensor | None = None) -> Tensor:
        """Logits at the needed positions with the live weights, shape (U, K or vocabulary), float32."""
        final = self.split.run(batch, self.layer, self.split.num_layers, hidden)
        return self.split.head(final.index_select(0, batch.rows), token_ids)

    @torch.no_grad()
    def losses(
        self,
        batch: PackedBatch,
        hidden: Tensor | None,
        tuned: TunedTensors,
        points: Sequence[Point],
        kind: LossKind,
        right: Tensor | None = None,
    ) -> Tensor:
        """Loss sums and weights at several points.

        Args:
            batch: The batch.
            hidden: What :meth:`prefix` returned for it.
            tuned: Writes each point into the live weights; they stay at the last one.
            points: Where to evaluate.
            kind: The loss.
            right: Whether each candidate is right, shape (C,), bool; needed for ``LossKind.ERRORS`` only.

        Returns:
            Shape (2, P), float32: totals and what to divide them by.
        """
        selected = self.candidate_rows and not needs_full_logits(kind, batch)
        token_ids = batch.choice_ids if selected else None
        if self._pairs(batch, len(points)):
            finals = self._paired_states(batch, hidden, tuned, points)
        else:
            finals = self._single_states(batch, hidden, tuned, points)
        sums: list[LossSum] = []
        for final in finals:
            sums.append(training_loss(kind, self.split.head(final, token_ids), batch, selected, right))
        return stack(sums)

    def _pairs(self, batch: PackedBatch, num_points: int) -> bool:
        if num_points == 1 or self.layer + 1 == self.split.num_layers:
            return False
        if self.paired is not None:
            return self.paired
        return batch.num_tokens <= _PAIR_TOKENS.get(batch.input_ids.device.type, _PAIR_TOKENS_ACCELERATOR)

    def _single_states(
        self, batch: PackedBatch, hidden: Tensor | None, tuned: TunedTensors, points: Sequence[Point]
    ) -> list[Tensor]:
        """Final hidden states at the needed positions (U, hidden) of each point, one run of the suffix after the other."""
        states = []
        for point in points:
            tuned.write(point.direction, point.scale)
            final = self.split.run(batch, self.layer, self.split.num_layers, hidden)
            states.append(final.index_select(0, batch.rows))
        return states

    def _paired_states(
        self, batch: PackedBatch, hidden: Tensor | None, tuned: TunedTensors, points: Sequence[Point]
    ) -> list[Tensor]:
        """The same with one run of the layers above the tuned one, over all points' copies of the batch."""
        outputs = []
        for point in points:
            tuned.write(point.direction, point.scale)
            outputs.append(self.split.run(batch, self.layer, self.layer + 1, hidden))
        copies = batch.repeat(len(points))
        final = self.split.run(copies, self.layer + 1, self.split.num_layers, torch.cat(outputs))
        return [states.index_select(0, batch.rows) for states in final.split(batch.num_tokens)]
