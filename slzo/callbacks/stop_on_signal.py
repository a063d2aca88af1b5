"""Ctrl-C and SIGTERM end a training between two steps."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(Callback):
    """Ends a training at the end of its present step, or of the present batch of a validation, which a resume does again.

    A second signal ends it at once: the step is lost, and nothing is saved. Outside of the steps the first one does so. With
    several processes Lightning handles signals.
    """

    def __init__(self) -> None:
        self._handled: tuple[signal.Signals, ...] = ()
        self._requested: signal.Signals | None = None
        self._waits = False

    @contextmanager
    def handling(self, num_processes: int) -> Iterator[None]:
        """Handle the signals while a training lasts."""
        self._requested, self._waits = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # a job in the background of a shell ignores Ctrl-C
        before = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
        if num_processes == 1:
            self._handled = tuple(before)
        elif signal.SIGTERM in before:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Lightning's then
        self._install()
        try:
            yield
        finally:
            self._handled = ()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _install(self) -> None:
        for number in self._handled:
            signal.signal(number, self._handle)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if not self._waits or self._requested is not None:
            raise Interrupted(number, saves=not self._waits)
        self._requested = signal.Signals(number)
        # print could be what was interrupted
        os.write(2, f"\nslzo: {self._requested.name}: stops after this step; once more to stop at once\n".encode())

    def _stop_if_requested(self) -> None:
        if self._requested is not None:
            raise Interrupted(self._requested)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait: a checkpoint is restored next."""
        self._waits = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once: rows may be scored before the first step."""
        self._install()  # Lightning has put its own handler in front
        self._waits = False
        self._stop_if_requested()

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the step, or wait until it is done."""
        self._waits = True
        self._stop_if_requested()

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop a validation."""
        self._stop_if_requested()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once: rows are scored, and every step is done."""
        self._waits = False
        self._stop_if_requested()
