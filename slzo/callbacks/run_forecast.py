"""Says after the first steps how long the run will take, and what memory."""

import math
import statistics
import time
from dataclasses import dataclass
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.run_summary import RunSummary
from slzo.console import say
from slzo.module import ZOModule
from slzo.runtime import peak_memory_gb

# the first one warms up
_STEPS = 4


@dataclass(frozen=True)
class Forecast:
    """What a run is expected to take from now on.

    Attributes:
        steps: That are left.
        step_seconds: Of one; less once the states that enter the tuned layer are kept.
        validations: That are left.
        row_seconds: Of scoring a row; ``None`` if not known.
        num_dev: Rows of a validation.
        num_test: Rows scored at the end.
        memory_gb: Largest memory, GiB, if the prefix cache grows to what the training rows need.
    """

    steps: int
    step_seconds: float
    validations: int
    row_seconds: float | None
    num_dev: int
    num_test: int
    memory_gb: float

    @property
    def seconds(self) -> float:
        """In all."""
        rows = self.validations * self.num_dev + self.num_test
        return self.steps * self.step_seconds + rows * (self.row_seconds or 0.0)

    def line(self) -> str:
        """For the user."""
        parts = [f"{self.steps} steps of {self.step_seconds:.2g} s"]
        if self.row_seconds is None:
            parts.append(f"{self.validations} validations and {self.num_test} held-out rows not counted")
        else:
            parts.append(f"{self.validations} validations of {self.num_dev * self.row_seconds:.2g} s")
            parts.append(f"held-out rows {self.num_test * self.row_seconds:.2g} s")
        return f"Expect     up to {duration(self.seconds)} more ({', '.join(parts)}); memory about {self.memory_gb:.2g} GiB"


def duration(seconds: float) -> str:
    """Such as ``45 s``, ``3 min 20 s`` or ``2 h 5 min``."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


class RunForecast(Callback):
    """Times the first steps and says what is to be expected; a run of few steps is not worth it."""

    def __init__(self) -> None:
        self._begun = 0.0
        self._seconds: list[float] = []

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to time."""
        self._seconds = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """A step begins."""
        self._begun = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """After some steps, say it."""
        if len(self._seconds) >= _STEPS or not isinstance(pl_module, ZOModule):
            return
        self._seconds.append(time.perf_counter() - self._begun)
        left = _planned(trainer) - trainer.global_step
        if len(self._seconds) == _STEPS and left > _STEPS:
            say(forecast(trainer, pl_module, left, statistics.median(self._seconds[1:])).line())


def forecast(trainer: Trainer, module: ZOModule, steps: int, step_seconds: float) -> Forecast:
    """What the steps that are left will take, each of ``step_seconds``."""
    splits = module.datamodule.splits
    assert splits is not None
    every = trainer.val_check_batch
    validations = math.ceil(steps / every) if trainer.enable_validation and every and every < math.inf else 0
    summary = next((c for c in trainer.callbacks if isinstance(c, RunSummary)), None)  # type: ignore[attr-defined]
    return Forecast(
        steps,
        step_seconds,
        validations,
        None if summary is None else summary.row_seconds,
        len(splits.dev),
        0 if summary is None else len(splits.test),
        peak_memory_gb(module.device) + _cache_growth(trainer, module),
    )


def _planned(trainer: Trainer) -> int:
    """Steps of the whole run, as far as they are known."""
    epochs = (trainer.max_epochs or -1) * trainer.num_training_batches
    limits = [int(limit) for limit in (trainer.max_steps, epochs) if 0 < limit < math.inf]
    return min(limits, default=0)


def _cache_growth(trainer: Trainer, module: ZOModule) -> float:
    """GiB that the prefix cache still takes for the training rows that were not seen yet, on the CPU."""
    assert module.tuned_model is not None
    cache, data = module.tuned_model.forward.cache, module.datamodule
    seen = trainer.global_step * data.batch_size
    if not seen or module.device.type != "cpu" or cache.directory is not None:
        return 0.0
    unseen = max(0, len(data.rows("train")) - seen)
    return min(cache.budget - cache.num_bytes, cache.num_bytes * unseen / seen) / 2**30
