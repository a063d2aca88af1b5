"""Ctrl-C, SIGTERM and the preemption signal of SLURM during the steps of a training."""

import os
import signal
from contextlib import ExitStack
from types import FrameType

import torch
from lightning.pytorch import Trainer

from slzo.utils.errors import Interrupted
from slzo.utils.signals import handle_signals, unignored_signals


class StopSignals:
    """Records the first signal and raises at the second one; outside of the steps it raises at the first one.

    Attributes:
        waits: Whether a step or a validation is running, so that a signal waits until the state is saved.
        requested: Number of the first signal that this process received, 0 for none.
    """

    def __init__(self) -> None:
        self.waits = False
        self.requested = 0
        self._handlers = ExitStack()

    def install(self) -> None:
        """Handle the signals. Call this when training starts, after Lightning has installed its own handlers."""
        self.waits, self.requested = False, 0
        self._handlers.enter_context(handle_signals(unignored_signals(), self._handle))

    def remove(self) -> None:
        """Restore the previous handlers."""
        self._handlers.close()

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.waits or self.requested:
            raise Interrupted(number)
        self.requested = number
        # not print, which may be what the signal interrupted
        name = signal.Signals(number).name
        os.write(2, f"\nslzo: {name}: stopping after this step or validation; send it again to stop at once\n".encode())


def max_over_processes(trainer: Trainer, *values: int) -> list[int]:
    """Return the largest of each value over the processes. A collective call."""
    if trainer.world_size == 1:
        return list(values)
    own = torch.tensor([float(value) for value in values], device=trainer.strategy.root_device)
    found: list[float] = trainer.strategy.reduce(own, reduce_op="max").tolist()
    return [int(value) for value in found]
