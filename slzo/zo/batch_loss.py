"""The loss of one batch of rows, as estimators ask for it."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from slzo.batches.losses import LogitLoss, LossSum, stack
from slzo.data.batch import Row, TrainBatch
from slzo.evaluation.generation import Answer
from slzo.evaluation.sampling import Sampling
from slzo.models.arrival import Arrival
from slzo.tasks.base import Example
from slzo.zo.derivatives import back_propagate, forward_derivative
from slzo.zo.estimators.base import Loss, Point
from slzo.zo.forward import SuffixForward
from slzo.zo.tuned import Direction, TunedTensors


@dataclass(frozen=True)
class Surroundings:
    """What an objective can make a loss of.

    Attributes:
        forward: Evaluates logits.
        tuned: What the loss is a function of.
        answers: Generates an answer to the prompt of each of some rows at each of some points; these have rows of their own.
            The likeliest tokens, or sampled ones with a key for each answer, the points one after the other.
        reduce: Adds tensors up over processes.
        seed: Of the run, for what is drawn at random.
        step: Of the run.
    """

    forward: SuffixForward
    tuned: TunedTensors
    answers: Callable[[Sequence[Point], Sequence[Sequence[Row]], Sampling | None], list[list[Answer]]]
    reduce: Callable[[Tensor], Tensor]
    seed: int = 0
    step: int = 0


@dataclass(frozen=True)
class _SummedLoss(Loss):
    """Sums and what to divide them by travel together: averages of processes with other counts would be another loss.

    Attributes:
        around: What the loss is made of.
        batch: The rows of this process.
    """

    around: Surroundings
    batch: TrainBatch

    @abstractmethod
    def sums(self, points: Sequence[Point]) -> Tensor:
        """Totals and weights of the rows of this process, shape (2, P)."""

    def at(self, points: Sequence[Point]) -> Tensor:
        sums = self.around.reduce(self.sums(points))
        shares = points[0].rows.of
        weights = sums[1].view(-1, shares).sum(dim=1, keepdim=True).expand(-1, shares).reshape(-1)
        return sums[0] * shares / weights


@dataclass(frozen=True)
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
        batch, around = self.batch, self.around
        return around.forward.losses(
            batch.packed, self.hidden, around.tuned, points, self.objective, max_tokens=batch.max_tokens
        )

    def gradient(self) -> tuple[float, Direction]:
        around = self.around
        (total, weight), gradient = back_propagate(around.forward.parts.model, around.tuned, self._here)
        sums = around.reduce(torch.stack([total, weight]))
        return float(sums[0] / sums[1]), {name: around.reduce(own) / sums[1] for name, own in gradient.items()}

    def slope(self, direction: Direction) -> tuple[float, float]:
        around = self.around
        here = forward_derivative(around.forward.parts.model, around.tuned, direction, self._here)
        sums = around.reduce(torch.stack(here))
        return float(sums[0] / sums[2]), float(sums[1] / sums[2])

    def _here(self) -> LossSum:
        return self.around.forward.loss(self.batch.packed, self.hidden, self.objective)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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
        for rows, answers in zip(chosen, self.around.answers(points, chosen, None), strict=True):
            losses = self.of_answers([answer.text for answer in answers], [row.example for row in rows]) if rows else []
            found.append(LossSum(*torch.tensor([sum(losses), float(len(rows))], device=device)))
        return stack(found)
