"""Ctrl-C and SIGTERM end a training between two steps, on all processes at the same one."""

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.strategies.launchers import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector

from slzo.errors import Interrupted

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopOnSignal(Callback):
    """Ends a training at the end of its present step, or of the present batch of a validation, which a resume does again.

    A second signal ends it at once: the step is lost, and nothing is saved. Outside of the steps the first one does so. Several
    processes agree before each step and each batch of a validation: a signal to any of them ends all at the same place.
    """

    def __init__(self) -> None:
        self._handled: tuple[signal.Signals, ...] = ()
        self._requested: signal.Signals | None = None
        self._waits = False
        self._alone = True
        self._common_batches = 0

    @property
    def handles(self) -> bool:
        """Whether a training is under way whose signals are handled here."""
        return bool(self._handled)

    @contextmanager
    def handling(self, num_processes: int) -> Iterator[None]:
        """Handle the signals while a training lasts."""
        self._requested, self._waits, self._alone = None, False, num_processes == 1
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        # a job in the background of a shell ignores Ctrl-C
        before = {each: signal.getsignal(each) for each in _SIGNALS if signal.getsignal(each) != signal.SIG_IGN}
        self._handled = tuple(before)
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
            raise Interrupted(number, saves=self._alone and not self._waits)
        self._requested = signal.Signals(number)
        # print could be what was interrupted
        os.write(2, f"\nslzo: {self._requested.name}: stops after this step; once more to stop at once\n".encode())

    def _stop_if_requested(self, trainer: Trainer) -> None:
        number = int(self._requested or 0)
        if not self._alone:
            own = torch.tensor(float(number), device=trainer.strategy.root_device)
            number = int(trainer.strategy.reduce(own, reduce_op="max"))
        if number:
            raise Interrupted(number)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Wait: a checkpoint is restored next."""
        self._waits = True

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once: rows may be scored before the first step."""
        self._install()  # Lightning has put its own handler in front
        self._stop_if_requested(trainer)
        self._waits = False

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop before the step, or wait until it is done."""
        self._waits = True
        self._stop_if_requested(trainer)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Find out how many batches every process has: at these they can agree."""
        if not self.handles:
            return
        self._common_batches = int(sum(trainer.num_val_batches))
        if not self._alone:
            own = torch.tensor(float(self._common_batches), device=trainer.strategy.root_device)
            self._common_batches = int(trainer.strategy.reduce(own, reduce_op="min"))

    def on_validation_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Stop a validation."""
        if self.handles and batch_idx < self._common_batches:
            self._stop_if_requested(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop at once: rows are scored, and every step is done."""
        self._stop_if_requested(trainer)
        self._waits = False

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Hand a signal that ends this process at once on to those that it has started."""
        launcher = trainer.strategy.launcher
        if (
            isinstance(exception, Interrupted)
            and not exception.saves
            and isinstance(launcher, _SubprocessScriptLauncher)
        ):
            launcher.kill(exception.number)


class FitSignals(_SignalConnector):
    """Lightning's handlers of signals, but for what ends a training: there its message to the other processes can wait forever.

    Args:
        trainer: Whose it is.
        stop: Handles SIGTERM in its place.
    """

    def __init__(self, trainer: Trainer, stop: StopOnSignal) -> None:
        super().__init__(trainer)
        self._stop = stop

    def _sigterm_notifier_fn(self, signum: int, frame: FrameType) -> None:
        if not self._stop.handles:
            super()._sigterm_notifier_fn(signum, frame)
