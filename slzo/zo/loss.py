"""The loss of one batch of rows, as estimators ask for it."""

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss, LossSum, stack
from slzo.data.batch import Row, TrainBatch
from slzo.evaluation.decoding import VariedLayers
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.generation import Answer
from slzo.evaluation.sampling import Sampling
from slzo.models.arrival import Arrival
from slzo.tasks.base import Example
from slzo.utils.errors import SlzoError
from slzo.zo.derivatives import back_propagate, forward_derivative
from slzo.zo.estimators.base import Loss, Point
from slzo.zo.forward import SuffixForward
from slzo.zo.tuned import Direction, TunedTensors


@dataclass(frozen=True)
class LossContext:
    """What an objective makes the loss of a batch from.

    Attributes:
        forward: Evaluates logits.
        tuned: What the loss is a function of.
        reduce: Adds tensors up over processes.
        evaluator: Generates answers; ``None`` where the objective needs none.
        seed: Seed of the run, for what is drawn at random.
        step: Step of the run.
    """

    forward: SuffixForward
    tuned: TunedTensors
    reduce: Callable[[Tensor], Tensor]
    evaluator: Evaluator | None = None
    seed: int = 0
    step: int = 0

    def answers(
        self, points: Sequence[Point], rows: Sequence[Sequence[Row]], sampling: Sampling | None = None
    ) -> list[list[Answer]]:
        """Generated answers to the rows of each point; the live weights stay at one of the points.

        ``sampling`` has a key for each answer, the points one after the other; without it the likeliest tokens are taken.

        Raises:
            SlzoError: There is no evaluator.
        """
        if self.evaluator is None:
            raise SlzoError("data.objective: it generates answers, and no evaluator is given")
        span = self.forward.span
        if self.forward.decodes_together:
            with live_points(self.tuned, points) as write:
                return self.evaluator.answers_at_points(rows, VariedLayers(span.start, span.stop, write), sampling)
        found: list[list[Answer]] = []
        for point, own in zip(points, rows, strict=True):
            self.tuned.write(point.direction, point.scale)
            done = sum(map(len, found))
            keys = None if sampling is None else sampling.of(range(done, done + len(own)))
            found.append(self.evaluator.answers(own, keys) if own else [])
        return found


@dataclass
class _SummedLoss(Loss):
    """Sums and what to divide them by travel together: averages of processes with other counts would be another loss.

    Attributes:
        context: Model, masters and processes.
        batch: The rows of this process.
    """

    context: LossContext
    batch: TrainBatch

    @abstractmethod
    def sums(self, points: Sequence[Point]) -> Tensor:
        """Totals and weights of the rows of this process, shape (2, P)."""

    def at(self, points: Sequence[Point]) -> Tensor:
        sums = self.context.reduce(self.sums(points))
        shares = points[0].rows.of
        weights = sums[1].view(-1, shares).sum(dim=1, keepdim=True).expand(-1, shares).reshape(-1)
        return sums[0] * shares / weights


@dataclass
class BatchLogitLoss(_SummedLoss):
    """A loss of the logits at the answers' positions.

    Attributes:
        objective: The loss.
        states: Those that enter the first tuned layer, the same at all points; directions are drawn while they come.
    """

    objective: LogitLoss
    states: Arrival | None

    @property
    def hidden(self) -> Tensor | None:
        """The states, waited for."""
        return None if self.states is None else self.states.wait()

    def sums(self, points: Sequence[Point]) -> Tensor:
        batch, context = self.batch, self.context
        return context.forward.losses(
            batch.packed, self.hidden, context.tuned, points, self.objective, max_tokens=batch.max_tokens
        )

    def gradient(self) -> tuple[float, Direction]:
        context = self.context
        (total, weight), gradient = back_propagate(context.forward.parts.model, context.tuned, self._here)
        sums = context.reduce(torch.stack([total, weight]))
        return float(sums[0] / sums[1]), {name: context.reduce(own) / sums[1] for name, own in gradient.items()}

    def slope(self, direction: Direction) -> tuple[float, float]:
        context = self.context
        here = forward_derivative(context.forward.parts.model, context.tuned, direction, self._here)
        sums = context.reduce(torch.stack(here))
        return float(sums[0] / sums[2]), float(sums[1] / sums[2])

    def _here(self) -> LossSum:
        return self.context.forward.loss(self.batch.packed, self.hidden, self.objective)


@dataclass
class RowsLoss(_SummedLoss):
    """A loss of what is generated for rows. At all points together: see :mod:`slzo.evaluation.decoding`."""

    def rows_of(self, point: Point) -> tuple[Row, ...]:
        """The rows that a point is evaluated on."""
        rows, (number, shares) = self.batch.rows, point.rows
        return rows[len(rows) * number // shares : len(rows) * (number + 1) // shares]

    def gradient(self) -> tuple[float, Direction]:
        raise NotImplementedError("a generated answer has no gradient")

    def slope(self, direction: Direction) -> tuple[float, float]:
        raise NotImplementedError("a generated answer has no derivative")


@dataclass
class BatchAnswerLoss(RowsLoss):
    """A loss of each generated answer.

    Attributes:
        of_answers: The loss of each example from its generated answer.
    """

    of_answers: Callable[[Sequence[str], Sequence[Example]], Sequence[float]]

    def sums(self, points: Sequence[Point]) -> Tensor:
        device = self.batch.packed.input_ids.device
        chosen = [self.rows_of(point) for point in points]
        found = []
        for rows, answers in zip(chosen, self.context.answers(points, chosen, None), strict=True):
            losses = self.of_answers([answer.text for answer in answers], [row.example for row in rows]) if rows else []
            found.append(LossSum(*torch.tensor([sum(losses), float(len(rows))], device=device)))
        return stack(found)


@contextmanager
@torch.no_grad()
def live_points(tuned: TunedTensors, points: Sequence[Point]) -> Iterator[Callable[[int], None]]:
    """Gives a function that makes a point's weights the live ones, by its number in ``points``.

    Copies of the weights are held where they take no more than ``tuned.hold_bytes``, and a change is one of addresses; else
    each change writes. Afterwards the live weights are in their own place, at one of the points.
    """
    names = {name for point in points for name in point.direction}
    live = {name: tensor.live for name, tensor in tuned.items() if name in names}
    num_bytes = sum(tensor.numel() * tensor.element_size() for tensor in live.values())
    if len(points) * num_bytes > tuned.hold_bytes:
        yield lambda number: _write(tuned, points[number])
        return
    own = {name: tensor.data for name, tensor in live.items()}
    copies: list[dict[str, Tensor]] = []
    for point in points[:-1]:
        _write(tuned, point)
        copies.append({name: tensor.data.clone() for name, tensor in live.items()})
    _write(tuned, points[-1])
    copies.append(own)

    def change(number: int) -> None:
        for name, tensor in live.items():
            tensor.data = copies[number][name]

    try:
        yield change
    finally:
        change(len(points) - 1)


def _write(tuned: TunedTensors, point: Point) -> None:
    if point.direction:
        tuned.write(point.direction, point.scale)
    else:  # the masters themselves: what an earlier point moved goes back
        tuned.restore()
