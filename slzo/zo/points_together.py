"""The tuned layers at several points in one run, where a step moves their weights by matrices of low rank.

A batch is repeated for each point. A linear map multiplies the rows of all copies by the weight that they share, and what the
weight moves at a point is added to the rows of that point: nothing is written, and no moved matrix is made.

    x_p W_p^T = x_p W^T + s_p (x_p V_p) U_p^T    for W_p = W + s_p U_p V_p^T
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from slzo.batches.packing import PackedBatch
from slzo.models.linear import OneDNNLinear
from slzo.models.parts import ModelParts
from slzo.zo.estimators.base import Point
from slzo.zo.factors import FactoredDirection, Factors, drawn_of
from slzo.zo.span import Span
from slzo.zo.tensors import TunedTensor
from slzo.zo.tuned import TunedTensors

# A matrix is narrow if a product with it costs little beside one with the weight: LoRA's, and factors.
_NARROW, _NARROWER = 64, 8

_Add = Callable[[Tensor, Tensor], Tensor]
"""Adds in place to the outputs of a module, (P, T, out), what a tensor of it moves at each point, given its inputs."""


@dataclass(eq=False)
class _Rows:
    """Notes whether a module saw the rows of all copies once.

    Attributes:
        points: How many copies.
        tokens: Rows of each.
    """

    points: int
    tokens: int
    seen: int = 0
    fits: bool = True

    def takes(self, args: Sequence[Any]) -> bool:
        self.seen += 1
        rows = args[0] if args else None
        # (1, P T, ...), or (P T, in) in layers that flatten what enters their MLP
        shape = () if not isinstance(rows, Tensor) else rows.shape[:2] if rows.dim() > 2 else (1, *rows.shape[:1])
        self.fits = self.fits and self.seen == 1 and shape == (1, self.points * self.tokens)
        return self.fits


@dataclass(eq=False)
class _LinearAtPoints(_Rows):
    """Adds to a linear map's outputs what each point moves."""

    adds: list[_Add] = field(default_factory=list)

    def __call__(self, module: nn.Module, args: Sequence[Any], output: Tensor) -> None:
        if self.takes(args):
            inputs, outputs = args[0].reshape(self.points, self.tokens, -1), output.view(self.points, self.tokens, -1)
            for add in self.adds:
                add(inputs, outputs)


@dataclass(eq=False)
class _VectorsAtPoints(_Rows):
    """Runs a module that has vectors only, such as a norm, again at each point."""

    at: Sequence[Point] = ()
    tensors: dict[str, TunedTensor] = field(default_factory=dict)

    def __call__(self, module: nn.Module, args: Sequence[Any], output: Tensor) -> Tensor | None:
        if not self.takes(args):
            return None
        found, dim = [], 1 if args[0].dim() > 2 else 0
        for point, rows in zip(self.at, args[0].chunk(self.points, dim), strict=True):
            for name, tensor in self.tensors.items():
                tensor.write(point.direction.get(name), point.scale)
            found.append(module.forward(rows, *args[1:]))
        for tensor in self.tensors.values():
            tensor.write(None, 0.0)
        return torch.cat(found, dim)


def of_low_rank(parts: ModelParts, span: Span, tuned: TunedTensors, points: Sequence[Point]) -> bool:
    """Whether points move the layers of a span by matrices of low rank and vectors alone, with float32 weights."""
    if not span.inside or not parts.packed or parts.compile:
        return False
    moved = {name for point in points for name in point.direction}
    # others are drawn again at each look: they are too large to hold
    if not moved or not all(isinstance(point.direction, FactoredDirection) for point in points if point.direction):
        return False
    tensors = {name: tensor for name, tensor in tuned.items() if name in moved}
    return all(_is_cheap(parts, name, tensor, points) for name, tensor in tensors.items())


def run_together(
    parts: ModelParts,
    span: Span,
    tuned: TunedTensors,
    points: Sequence[Point],
    batch: PackedBatch,
    hidden: Tensor | None,
) -> Tensor | None:
    """States after the layers of a span, of a copy of the batch for each point, shape (P T, hidden).

    Args:
        parts: The model.
        span: The layers; the points are :func:`of_low_rank` in them.
        tuned: What is tuned; the live weights are at the masters, before and after.
        points: One for each copy.
        batch: The rows.
        hidden: What enters the first layer, shape (T, hidden), the same at all points; ``None`` for layer 0.

    Returns:
        ``None`` where a module of the layers is not called once with all rows, as an expert is not.
    """
    hooks = _hooks(parts, tuned, points, batch.num_tokens)
    handles = [module.register_forward_hook(hook) for module, hook in hooks.items()]
    try:
        repeated = batch.repeat(len(points)) if len(points) > 1 else batch
        states = None if hidden is None else hidden.repeat(len(points), 1)
        output = parts.run(repeated, span.start, span.stop, states)
    finally:
        for handle in handles:
            handle.remove()
    return output if all(hook.fits and hook.seen == 1 for hook in hooks.values()) else None


def _is_cheap(parts: ModelParts, name: str, tensor: TunedTensor, points: Sequence[Point]) -> bool:
    if tensor.live.dtype != torch.float32:  # what rounding leaves of a direction is the point that is evaluated there
        return False
    module = parts.runs_as(name.rpartition(".")[0])
    if module is None:
        return False
    if tensor.live.dim() == 1:
        return True
    return isinstance(module, nn.Linear | OneDNNLinear | Conv1D) and all(
        _is_narrow(tensor.moves(drawn_of(point.direction, name))) for point in points if name in point.direction
    )


def _is_narrow(moved: Tensor | Factors) -> bool:
    if isinstance(moved, Factors):
        return moved.left.shape[1] <= _NARROW
    if moved.dim() != 2:
        return False
    small, large = sorted(moved.shape)
    return small <= _NARROW and small * _NARROWER <= large


def _hooks(
    parts: ModelParts, tuned: TunedTensors, points: Sequence[Point], tokens: int
) -> dict[nn.Module, _LinearAtPoints | _VectorsAtPoints]:
    hooks: dict[nn.Module, _LinearAtPoints | _VectorsAtPoints] = {}
    for name, tensor in tuned.items():
        if not any(name in point.direction for point in points):
            continue
        module = parts.runs_as(name.rpartition(".")[0])
        assert module is not None
        if isinstance(module, nn.Linear | OneDNNLinear | Conv1D):
            linear = hooks.setdefault(module, _LinearAtPoints(len(points), tokens))
            assert isinstance(linear, _LinearAtPoints)
            linear.adds.append(_addition(name, tensor, points, isinstance(module, Conv1D)))
        else:
            vectors = hooks.setdefault(module, _VectorsAtPoints(len(points), tokens, at=points))
            assert isinstance(vectors, _VectorsAtPoints)
            vectors.tensors[name] = tensor
    return hooks


def _addition(name: str, tensor: TunedTensor, points: Sequence[Point], transposed: bool) -> _Add:
    """What a tensor of a linear map adds to its outputs at each point; one that does not move there adds zeros."""
    first = next(point for point in points if name in point.direction)
    moved = [
        (tensor.moves(drawn_of((point if name in point.direction else first).direction, name)), point)
        for point in points
    ]
    scales = torch.tensor(
        [point.scale if name in point.direction else 0.0 for point in points], device=tensor.live.device
    )[:, None, None]
    if tensor.live.dim() == 1:
        biases = scales * torch.stack([own for own, _ in moved if isinstance(own, Tensor)])[:, None]
        return lambda inputs, outputs: outputs.add_(biases)
    factors = [own for own, _ in moved if isinstance(own, Factors)]
    if factors:
        sides = [(own.right, own.left) if transposed else (own.left, own.right) for own in factors]
        into = torch.stack([right for _, right in sides])
        out = torch.stack([left for left, _ in sides]).mul_(scales).transpose(1, 2)
        return lambda inputs, outputs: outputs.baddbmm_(inputs @ into, out)
    whole = torch.stack([own if transposed else own.T for own, _ in moved if isinstance(own, Tensor)]) * scales
    return lambda inputs, outputs: outputs.baddbmm_(inputs, whole)
