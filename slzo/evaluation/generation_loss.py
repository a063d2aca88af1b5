"""The F1 of generated answers as a training objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from slzo.data.batch import TrainBatch
from slzo.evaluation.evaluator import Evaluator
from slzo.evaluation.scoring import stack
from slzo.zo.estimators import Point
from slzo.zo.objective import mean_losses
from slzo.zo.tuned import Direction, TunedTensors


@dataclass(frozen=True)
class GenerationLoss:
    """1 - F1 of generated answers, which run the whole model: they need keys and values of every layer.

    Attributes:
        evaluator: Generates with the live weights.
        tuned: What is perturbed.
        batch: The rows of this process.
        reduce: Adds up over processes.
    """

    evaluator: Evaluator
    tuned: TunedTensors
    batch: TrainBatch
    reduce: Callable[[Tensor], Tensor]

    def at(self, points: Sequence[Point]) -> Tensor:
        """See :class:`slzo.zo.estimators.base.Loss`."""
        rows = self.batch.rows
        sums = []
        for point in points:
            number, parts = point.share
            self.tuned.write(point.direction, point.scale)
            sums.append(
                self.evaluator.missing_f1(rows[len(rows) * number // parts : len(rows) * (number + 1) // parts])
            )
        return mean_losses(self.reduce(stack(sums)), points)

    def gradient(self) -> tuple[float, Direction]:
        """A generated answer has no gradient."""
        raise NotImplementedError

    def slope(self, direction: Direction) -> tuple[float, float]:
        """A generated answer has no derivative."""
        raise NotImplementedError
