"""Losses that record what an estimator evaluates, or replay it from a log."""

from collections.abc import Sequence

import torch
from torch import Tensor

from slzo.checkpoints.step_log import StepRecord
from slzo.utils.errors import SlzoError
from slzo.zo.layer_output import OutputEstimator
from slzo.zo.loss import Loss, OutputGradient
from slzo.zo.tuned import Gradient, Point


class RecordedLoss(Loss):
    """Records every loss that an estimator evaluates at a point."""

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self.losses: list[float] = []

    def at(self, points: Sequence[Point]) -> Tensor:
        """Return the losses at several points, on the CPU. The estimator reads them too, so they are copied only once."""
        losses = self._loss.at(points).cpu()
        self.losses += losses.tolist()
        return losses

    def gradient(self) -> tuple[float, Gradient]:
        return self._loss.gradient()

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        return self._loss.gradient_from_output(estimate)


class ReplayedLoss(Loss):
    """Replays the losses of a step, without forward passes.

    Directions are drawn from seed, step and query, so the same losses give the same step bit for bit.
    """

    def __init__(self, record: StepRecord) -> None:
        self._record = record
        self.losses: list[float] = []

    def at(self, points: Sequence[Point]) -> Tensor:
        """Return the next losses of the step.

        Raises:
            SlzoError: The step has fewer losses.
        """
        first = len(self.losses)
        losses = self._record.losses[first : first + len(points)]
        if len(losses) < len(points):
            raise SlzoError(
                f"zo_log: step {self._record.step} has {len(self._record.losses)} losses, and more are needed, so it is not "
                "the log of these steps; remove it"
            )
        self.losses += losses
        return torch.tensor(losses, dtype=torch.float32)
