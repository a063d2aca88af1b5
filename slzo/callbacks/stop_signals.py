"""Ctrl-C and SIGTERM during the steps of a training."""

import os
import signal
import threading
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Trainer

from slzo.utils.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopSignals:
    """Notes the first signal and raises at the second one, or outside of the steps at the first one.

    Attributes:
        waits: Whether a step or a validation is under way, at whose end the state is saved.
    """

    def __init__(self) -> None:
        self.waits = False
        self._requested = 0
        self._before: dict[int, Any] = {}

    def install(self) -> None:
        """Handle the signals; after Lightning, which has put its own handlers in place when training starts."""
        self.waits, self._requested = False, 0
        if threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:  # a job in the background of a shell ignores Ctrl-C
                self._before[number] = signal.signal(number, self._handle)

    def remove(self) -> None:
        """Put the handlers back that were there before."""
        while self._before:
            number, handler = self._before.popitem()
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self.waits or self._requested:
            raise Interrupted(number)
        self._requested = number
        # print could be what was interrupted
        name = signal.Signals(number).name
        os.write(2, f"\nslzo: {name}: stops after this step or validation; once more to stop at once\n".encode())

    def requested(self, trainer: Trainer) -> int:
        """Number of the signal that came, 0 for none; with several processes that of any. A collective call."""
        if trainer.world_size == 1:
            return self._requested
        own = torch.tensor(float(self._requested), device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(own, reduce_op="max"))


def pass_on(trainer: Trainer, number: int) -> None:
    """Send a signal that ends this process to the processes that it has started."""
    kill = getattr(trainer.strategy.launcher, "kill", None)
    if kill is not None:
        kill(number)
