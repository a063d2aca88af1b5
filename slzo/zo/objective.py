"""The loss of a batch as a function of the tuned tensors alone."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Self

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from slzo.errors import SlzoError
from slzo.evaluation.scoring import LossKind, LossSum, needs_full_logits, stack, training_loss
from slzo.models.packing import PackedBatch
from slzo.models.prefix_cache import PrefixCache
from slzo.models.split import SplitModel
from slzo.zo.estimators.base import Point
from slzo.zo.tuned import Direction, TunedTensors

# Up to this many tokens both evaluations in one batch take less time than two batches: weights are read, and by oneDNN packed,
# once. Above, the matrix products fill the processor either way. CPU: measured on one Zen 5 core with SmolLM2-135M (38 tokens
# 0.75 of the time, 112 tokens 0.89, 220 tokens 0.97, 600 tokens 1.0). Accelerators take far more tokens to fill; not measured.
_PAIR_TOKENS = {"cpu": 320}
_PAIR_TOKENS_ACCELERATOR = 8192


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
    def of(cls, split: SplitModel, tuned: TunedTensors) -> Self:
        """The layers of a model that some tensors belong to."""
        owner = {id(tensor): index for index, layer in enumerate(split.layers) for tensor in layer.parameters()}
        layers = {owner.get(id(tensor.live), -1) for _, tensor in tuned.items()}
        if -1 in layers:
            return cls(0, split.num_layers, inside=False)
        return cls(min(layers), max(layers) + 1)


class Objective:
    """Evaluates a batch with the prefix computed once and only the needed logits.

    Args:
        split: The model.
        span: The layers that hold tuned tensors.
        cache: Where prefix states are kept between steps.
        candidate_rows: Compute only the candidates' rows of the head where the loss allows it.
        paired: Run the layers above the tuned ones for all points in one batch; ``None`` does so for small batches.
    """

    def __init__(
        self,
        split: SplitModel,
        span: Span,
        cache: PrefixCache,
        candidate_rows: bool = True,
        paired: bool | None = None,
    ) -> None:
        self.split = split
        self.span = span
        self.cache = cache
        self.candidate_rows = candidate_rows
        self.paired = paired
        cache.begin(span.start)

    @torch.no_grad()
    def prefix(self, batch: PackedBatch, keep: bool = True) -> Tensor | None:
        """Hidden states that enter the first tuned layer, shape (T, hidden); ``None`` if there is no layer before it.

        Only examples that the cache does not hold are run.

        Args:
            batch: The batch.
            keep: Offer new states to the cache; ``False`` only reads it.
        """
        if self.span.start == 0:
            return None
        missing = [number for number, key in enumerate(batch.example_index) if key not in self.cache]
        if missing:
            part = batch if len(missing) == batch.num_examples else batch.select(missing)
            fresh = self.cache.round(self.split.run(part, 0, self.span.start))
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
        return self.split.head(self._states(batch, hidden), token_ids)

    def loss(self, batch: PackedBatch, hidden: Tensor | None, kind: LossKind, right: Tensor | None = None) -> LossSum:
        """The loss with the live weights, summed; arguments as for :meth:`losses`. Gradients may flow."""
        selected = self._selects(kind, batch)
        logits = self.logits(batch, hidden, batch.choice_ids if selected else None)
        return training_loss(kind, logits, batch, selected, right)

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
            points: Where to evaluate, and on which shares of the batch (see :class:`slzo.zo.estimators.base.Loss`).
            kind: The loss.
            right: Whether each candidate is right, shape (C,), bool; needed for ``LossKind.ERRORS`` only.

        Returns:
            Shape (2, P), float32: totals and what to divide them by, of each point's rows.
        """
        parts = batch.split(points[0].share.of)
        copies = [points[start : start + len(parts)] for start in range(0, len(points), len(parts))]
        inner = self.span.inside and self.span.stop < self.split.num_layers
        if inner and self._pairs(batch, len(copies)):
            return self._joined_losses(batch, parts, hidden, tuned, copies, kind, right)
        if inner and len(parts) > 1:
            joined = [self._joined_losses(batch, parts, hidden, tuned, [copy], kind, right) for copy in copies]
            return torch.cat(joined, dim=1)
        inputs, known = _divide(hidden, parts, _tokens), _divide(right, parts, _candidates)
        sums = []
        for point in points:
            part = parts[point.share.number]
            if part is None:
                sums.append(_nothing(batch))
                continue
            tuned.write(point.direction, point.scale)
            sums.append(self.loss(part, inputs[point.share.number], kind, known[point.share.number]))
        return stack(sums)

    def _states(self, batch: PackedBatch, hidden: Tensor | None) -> Tensor:
        """Final hidden states at the needed positions, shape (U, hidden)."""
        final = self.split.run(batch, self.span.start, self.split.num_layers, hidden)
        return final.index_select(0, batch.rows)

    def _selects(self, kind: LossKind, batch: PackedBatch) -> bool:
        return self.candidate_rows and not needs_full_logits(kind, batch)

    def _pairs(self, batch: PackedBatch, num_copies: int) -> bool:
        if num_copies == 1:
            return False
        if self.paired is not None:
            return self.paired
        return batch.num_tokens <= _PAIR_TOKENS.get(batch.input_ids.device.type, _PAIR_TOKENS_ACCELERATOR)

    def _joined_losses(
        self,
        batch: PackedBatch,
        parts: Sequence[PackedBatch | None],
        hidden: Tensor | None,
        tuned: TunedTensors,
        copies: Sequence[Sequence[Point]],
        kind: LossKind,
        right: Tensor | None,
    ) -> Tensor:
        """The same with one run of the layers above the tuned ones.

        It is over as many copies of the batch as there are points for each part of it.
        """
        inputs, known = _divide(hidden, parts, _tokens), _divide(right, parts, _candidates)
        outputs = []
        for point in (point for copy in copies for point in copy):
            part = parts[point.share.number]
            if part is not None:
                tuned.write(point.direction, point.scale)
                outputs.append(self.split.run(part, self.span.start, self.span.stop, inputs[point.share.number]))
        repeated = batch.repeat(len(copies)) if len(copies) > 1 else batch
        final = self.split.run(repeated, self.span.stop, self.split.num_layers, torch.cat(outputs))
        selected = self._selects(kind, batch)
        token_ids = batch.choice_ids if selected else None
        sums = []
        for states in final.split(batch.num_tokens):
            logits = _divide(self.split.head(states.index_select(0, batch.rows), token_ids), parts, _rows)
            for part, part_logits, part_right in zip(parts, logits, known, strict=True):
                if part is None or part_logits is None:
                    sums.append(_nothing(batch))
                else:
                    sums.append(training_loss(kind, part_logits, part, selected, part_right))
        return stack(sums)


def _divide(
    tensor: Tensor | None, parts: Sequence[PackedBatch | None], size: Callable[[PackedBatch], int]
) -> Sequence[Tensor | None]:
    """Each part's piece of a tensor."""
    if tensor is None:
        return [None] * len(parts)
    return tensor.split([0 if part is None else size(part) for part in parts])


def _tokens(part: PackedBatch) -> int:
    return part.num_tokens


def _candidates(part: PackedBatch) -> int:
    return part.candidate_length.numel()


def _rows(part: PackedBatch) -> int:
    return part.rows.numel()


def _nothing(batch: PackedBatch) -> LossSum:
    """The loss of no rows."""
    zero = torch.zeros((), device=batch.input_ids.device)
    return LossSum(zero, zero)


def mean_losses(sums: Tensor, points: Sequence[Point]) -> Tensor:
    """Losses from what :meth:`Objective.losses` returns, shape (P,); those of shares as :class:`Loss` wants them."""
    parts = points[0].share.of
    weights = sums[1].view(-1, parts).sum(dim=1, keepdim=True).expand(-1, parts).reshape(-1)
    return sums[0] * parts / weights


def _over_one_process(sums: Tensor) -> Tensor:
    return sums


@dataclass(frozen=True)
class BatchLoss:
    """The loss of one batch, as estimators ask for it (see :class:`slzo.zo.estimators.base.Loss`).

    Attributes:
        objective: Evaluates.
        tuned: What the loss is a function of.
        batch: The rows of this process.
        kind: The loss.
        right: Whether each candidate is right; needed for ``LossKind.ERRORS`` only.
        reduce: Adds tensors up over processes.
    """

    objective: Objective
    tuned: TunedTensors
    batch: PackedBatch
    kind: LossKind
    right: Tensor | None = None
    reduce: Callable[[Tensor], Tensor] = _over_one_process
    hidden: Tensor | None = None

    def at(self, points: Sequence[Point]) -> Tensor:
        """See :class:`slzo.zo.estimators.base.Loss`."""
        sums = self.reduce(self.objective.losses(self.batch, self.hidden, self.tuned, points, self.kind, self.right))
        return mean_losses(sums, points)

    def gradient(self) -> tuple[float, Direction]:
        """See :class:`slzo.zo.estimators.base.Loss`."""
        live = {name: tensor.live.detach().requires_grad_() for name, tensor in self.tuned.items()}
        with torch.enable_grad():
            total, weight = self._with(live)
            gradients = torch.autograd.grad(total, list(live.values()), allow_unused=True)
        sums = self.reduce(torch.stack([total.detach(), weight.detach()]))
        masters = {}
        for (name, tensor), gradient in zip(self.tuned.items(), gradients, strict=True):
            # a layer norm of a layer that feeds nothing, say, has no gradient
            pulled = torch.zeros_like(tensor.master) if gradient is None else tensor.pull_back(gradient)
            masters[name] = self.reduce(pulled) / sums[1]
        return float(sums[0] / sums[1]), masters

    def slope(self, direction: Direction) -> tuple[float, float]:
        """See :class:`slzo.zo.estimators.base.Loss`.

        Raises:
            SlzoError: The model has an operation without a forward derivative.
        """
        with torch.no_grad(), forward_ad.dual_level(), sdpa_kernel(SDPBackend.MATH):
            live = {
                name: forward_ad.make_dual(tensor.live.detach(), tensor.tangent(direction[name]))
                for name, tensor in self.tuned.items()
                if name in direction
            }
            try:
                total, weight = self._with(live)
            except (NotImplementedError, RuntimeError) as error:
                reason = " ".join(str(error).split())[:160]
                raise SlzoError(
                    f"model.estimator ForwardGradient: this model cannot be differentiated in forward mode ({reason}); "
                    "use SPSA, which needs loss values only"
                ) from error
            primal, tangent = forward_ad.unpack_dual(total)
            moved = torch.zeros_like(primal) if tangent is None else tangent
            sums = self.reduce(torch.stack([primal, moved, weight]))
        return float(sums[0] / sums[2]), float(sums[1] / sums[2])

    def _with(self, live: Mapping[str, Tensor]) -> LossSum:
        """The loss with other tensors in the place of the live ones; only for the time of the call."""
        model = self.objective.split.model
        paths = {id(parameter): name for name, parameter in model.named_parameters()}
        tensors = {paths[id(tensor.live)]: live[name] for name, tensor in self.tuned.items() if name in live}
        call = _Call(model, lambda: self.objective.loss(self.batch, self.hidden, self.kind, self.right))
        return functional_call(call, {f"model.{path}": tensor for path, tensor in tensors.items()}, ())


class _Call(nn.Module):
    """Calls a function as the forward of a module around the model, so that ``functional_call`` can exchange its tensors."""

    def __init__(self, model: nn.Module, function: Callable[[], LossSum]) -> None:
        super().__init__()
        self.model = model
        self._function = function

    def forward(self) -> LossSum:
        """The function's value."""
        return self._function()
