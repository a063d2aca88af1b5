"""The losses of a step, noted as the estimator asks for them, or given again from a log."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slzo.checkpoints.step_log import StepRecord
from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Loss, LossReport, Point
from slzo.zo.tuned import Direction


class RecordedLoss(Loss):
    """Notes the losses that are asked for.

    Args:
        loss: Computes them.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.noted: list[float] = []

    def at(self, points: Sequence[Point]) -> Tensor:
        """Losses at several points, on the CPU: the estimator reads them too, so they are copied once."""
        found = self._loss.at(points).cpu()
        self.noted += found.tolist()
        return found

    def gradient(self) -> tuple[float, Direction]:
        """Loss and gradient; not noted."""
        return self._loss.gradient()

    def slope(self, direction: Direction) -> tuple[float, float]:
        """Loss and slope; not noted."""
        return self._loss.slope(direction)

    @property
    def report(self) -> LossReport:
        """That of the loss."""
        return self._loss.report


class ReplayedLoss(Loss):
    """Gives the losses of a step again, without the model.

    Directions are drawn from seed, step and query, so the same losses make the same step, bit by bit.

    Args:
        record: The step.
        device: Where losses are wanted.
    """

    def __init__(self, record: StepRecord, device: torch.device) -> None:
        self._record, self._device = record, device
        self.noted: list[float] = []

    def at(self, points: Sequence[Point]) -> Tensor:
        """The next losses of the step.

        Raises:
            SlzoError: The step has fewer.
        """
        first = len(self.noted)
        found = self._record.losses[first : first + len(points)]
        if len(found) < len(points):
            raise SlzoError(
                f"zo_log: step {self._record.step} has {len(self._record.losses)} losses and more are asked for: it is not the "
                "log of these steps; remove it"
            )
        self.noted += found
        return torch.tensor(found, dtype=torch.float32, device=self._device)

    def gradient(self) -> tuple[float, Direction]:
        """Not possible."""
        raise NotImplementedError("a log of losses holds no gradient")

    def slope(self, direction: Direction) -> tuple[float, float]:
        """Not possible."""
        raise NotImplementedError("a log of losses holds no slope")
