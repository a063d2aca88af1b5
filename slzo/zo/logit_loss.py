"""The loss of a batch as a function of logits."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial, reduce

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss
from slzo.batches.packing import PackedBatch
from slzo.zo.batch_loss import SummedLoss
from slzo.zo.derivatives import vjp
from slzo.zo.factored import FactoredGradient
from slzo.zo.layer_output import OutputEstimator
from slzo.zo.layers_above import layers_vjp
from slzo.zo.loss import OutputGradient
from slzo.zo.packed_layer_output import PackedLayerOutput
from slzo.zo.processes import sum_tensors
from slzo.zo.tuned import Gradient, Point


@dataclass
class BatchLogitLoss(SummedLoss):
    """A loss of the logits at the answers' positions.

    Attributes:
        objective: The loss as a function of logits.
        states: Hidden states that enter the first tuned layer, the same at all points.
    """

    objective: LogitLoss
    states: Tensor | None

    def sums(self, points: Sequence[Point]) -> Tensor:
        losses, tuned = self.context.forward.losses, self.context.tuned
        pieces = (losses(*piece, tuned, points, self.objective, self.batch.max_tokens) for piece in self._pieces())
        return reduce(torch.add, pieces)

    def gradient(self) -> tuple[float, Gradient]:
        context, forward = self.context, self.context.forward
        sums = torch.zeros(2, device=self.batch.packed.gold.device)
        of_total = torch.zeros_like(sums)
        of_total[0] = 1.0  # a list as a tensor would be copied to a GPU, which waits for it
        gradient: dict[str, Tensor] = {}
        for piece, states in self._pieces():
            run = partial(forward.loss, piece, states, self.objective)
            found, vjp_fn = vjp(context.tuned, run)
            sums += found
            for name, own in context.tuned.with_zeros(vjp_fn(of_total)).items():
                gradient[name] = gradient[name].add_(own) if name in gradient else own
        sums, *summed = sum_tensors(context.sum_rows, [sums, *gradient.values()])
        return _mean(sums, dict(zip(gradient, summed, strict=True)))

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        context = self.context
        forward = context.forward
        start, stop = forward.span.start, forward.span.stop
        sums = torch.zeros(2, device=self.batch.packed.gold.device)
        gradient = FactoredGradient(context.tuned)
        evaluations = 0.0
        for piece, states in self._pieces():
            entering = forward.parts.run(piece, 0, 0) if states is None else states
            hidden, vjp_fn = layers_vjp(forward.parts, context.tuned, start, stop, piece, entering)
            output = PackedLayerOutput(
                forward, piece, entering, hidden, self.objective, self.batch.max_tokens, checks=context.step == 0
            )
            at_output, num_points = estimate(output)
            gradient.add(vjp_fn(at_output.to(hidden.dtype)))
            sums += output.sums
            evaluations += output.evaluations(num_points) * piece.num_tokens / self.batch.packed.num_tokens
        loss, mean = _mean(*gradient.total(sums, context.sum_rows, context.gather_rows))
        return OutputGradient(loss, mean, evaluations)

    def _pieces(self) -> Iterator[tuple[PackedBatch, Tensor | None]]:
        """Return the parts of the batch that run in one forward pass, with their states."""
        pieces = self.batch.packed.cut(self.batch.max_tokens)
        states: Sequence[Tensor | None] = [None] * len(pieces)
        if self.states is not None:
            states = self.states.split([piece.num_tokens for piece in pieces])
        return zip(pieces, states, strict=True)


def _mean(sums: Tensor, gradient: Gradient) -> tuple[float, Gradient]:
    """Return mean loss and gradient from total and weight, shape (2,), and the gradient of the total."""
    return float(sums[0] / sums[1]), {name: own.div_(sums[1]) for name, own in gradient.items()}
