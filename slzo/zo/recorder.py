"""The losses of a step, noted as the estimator asks for them, or given again."""

from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

import torch
from torch import Tensor

from slzo.errors import SlzoError
from slzo.step_log import StepRecord, WentBack
from slzo.zo.estimators.base import Loss, Point
from slzo.zo.tuned import Direction


class Writer(Protocol):
    """Where records go."""

    def append(self, record: StepRecord | WentBack) -> None:
        """Write one."""


class StepRecorder:
    """Notes each step's losses; steps that are known already are taken from them, without the model.

    Directions are drawn from seed, step and query, so that the same losses make the same step, bit by bit.

    Args:
        device: Where losses are wanted.
        known: Steps that were taken before.
        writer: Where records go; ``None`` keeps none.
    """

    def __init__(
        self, device: torch.device, known: Mapping[int, StepRecord] | None = None, writer: Writer | None = None
    ) -> None:
        self._device, self._writer = device, writer
        self._known = dict(known or {})
        self._noted: list[float] = []

    def loss(self, step: int, make: Callable[[], Loss]) -> Loss:
        """The loss of a step; ``make`` is called where it is not known."""
        self._noted = []
        record = self._known.get(step)
        return _Noted(make(), self._noted) if record is None else _Known(record, self._noted, self._device)

    def done(self, step: int, lr: float, eps: float) -> None:
        """Write a step that was taken.

        Raises:
            SlzoError: It was known, and is another one now.
        """
        record, known = StepRecord(step, lr, eps, tuple(self._noted)), self._known.pop(step, None)
        if known is not None and (len(known.losses), known.lr, known.eps) != (len(record.losses), lr, eps):
            raise SlzoError(
                f"zo_log: step {step} was taken with lr {known.lr:g}, eps {known.eps:g} and {len(known.losses)} losses, and now "
                f"it has {lr:g}, {eps:g} and {len(record.losses)}: it is not the log of these steps; remove it"
            )
        if self._writer is not None:
            self._writer.append(record)

    def went_back(self, steps: int, to: int) -> None:
        """Write that after ``steps`` steps the weights of step ``to`` were taken up again."""
        if self._writer is not None:
            self._writer.append(WentBack(steps, to))


class _Noted(Loss):
    def __init__(self, loss: Loss, noted: list[float]) -> None:
        self._loss, self._losses = loss, noted

    def at(self, points: Sequence[Point]) -> Tensor:
        found = self._loss.at(points).cpu()  # read once: the estimator reads them too
        self._losses += found.tolist()
        return found

    def gradient(self) -> tuple[float, Direction]:
        return self._loss.gradient()

    def slope(self, direction: Direction) -> tuple[float, float]:
        return self._loss.slope(direction)


class _Known(Loss):
    def __init__(self, record: StepRecord, noted: list[float], device: torch.device) -> None:
        self._record, self._losses, self._device = record, noted, device

    def at(self, points: Sequence[Point]) -> Tensor:
        first = len(self._losses)
        found = self._record.losses[first : first + len(points)]
        if len(found) < len(points):
            raise SlzoError(
                f"zo_log: step {self._record.step} has {len(self._record.losses)} losses and more are asked for: it is not the "
                "log of these steps; remove it"
            )
        self._losses += found
        return torch.tensor(found, dtype=torch.float32, device=self._device)

    def gradient(self) -> tuple[float, Direction]:
        raise NotImplementedError("a log of losses holds no gradient")

    def slope(self, direction: Direction) -> tuple[float, float]:
        raise NotImplementedError("a log of losses holds no slope")
