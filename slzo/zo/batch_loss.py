"""What the losses of a batch of rows have in common."""

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from slzo.data.batch import TrainBatch
from slzo.evaluation.evaluator import Evaluator
from slzo.zo.forward import SuffixForward
from slzo.zo.loss import Loss, LossReport
from slzo.zo.tuned import Point, TunedTensors


@dataclass(frozen=True)
class LossContext:
    """What an objective needs to compute the loss of a batch.

    Attributes:
        forward: Computes logits.
        tuned: The tensors that the loss is a function of.
        sum_rows: Returns the sum of a tensor over the processes.
        gather_rows: Returns the tensors of the processes, stacked.
        evaluator: Generates answers; ``None`` if the objective needs none.
        seed: Seed of the run.
        step: Step of the run.
        report: Is called with the additional results of each evaluation that has some.
    """

    forward: SuffixForward
    tuned: TunedTensors
    sum_rows: Callable[[Tensor], Tensor]
    gather_rows: Callable[[Tensor], Tensor]
    evaluator: Evaluator | None
    seed: int
    step: int
    report: Callable[[LossReport], None]


@dataclass
class SummedLoss(Loss):
    """A loss that is the quotient of a total and a weight. Both are added up over the processes before dividing.

    The rows of different processes may have different weights.

    Attributes:
        context: Model, tuned tensors and the sum over processes.
        batch: The rows of this process.
    """

    context: LossContext
    batch: TrainBatch

    @abstractmethod
    def sums(self, points: Sequence[Point]) -> Tensor:
        """Return totals and weights of the rows of this process, shape (2, P)."""

    def at(self, points: Sequence[Point]) -> Tensor:
        totals, weights = self.context.sum_rows(self.sums(points))
        return totals / weights
