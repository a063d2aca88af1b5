"""What the data loaders yield."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch

from slzo.data.encoding import EncodedExample
from slzo.evaluation.scoring import LossKind
from slzo.models.packing import PackedBatch, pack
from slzo.tasks.base import Example


@dataclass(frozen=True)
class TrainBatch:
    """A packed batch and the loss to take of it."""

    packed: PackedBatch
    loss: LossKind

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy on another device."""
        return replace(self, packed=self.packed.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class EvalBatch:
    """A packed batch, the examples it came from, in the same order, and the loss to report."""

    packed: PackedBatch
    examples: tuple[Example, ...]
    loss: LossKind

    def to(self, device: torch.device | str, non_blocking: bool = False) -> Self:
        """Copy on another device."""
        return replace(self, packed=self.packed.to(device, non_blocking=non_blocking))


@dataclass(frozen=True)
class TrainCollator:
    """Packs encoded examples for training."""

    loss: LossKind
    share_prompts: bool = True

    def __call__(self, encoded: Sequence[EncodedExample]) -> TrainBatch:
        """Pack in the given order."""
        return TrainBatch(pack(encoded, share_prompts=self.share_prompts), self.loss)


@dataclass(frozen=True)
class EvalCollator:
    """Packs encoded examples for scoring."""

    loss: LossKind
    share_prompts: bool = True

    def __call__(self, pairs: Sequence[tuple[EncodedExample, Example]]) -> EvalBatch:
        """Pack in the given order."""
        packed = pack([encoded for encoded, _ in pairs], share_prompts=self.share_prompts)
        return EvalBatch(packed, tuple(example for _, example in pairs), self.loss)
