"""Writes what each validation of a run found, with the time and the memory that it took until then."""

import json
import math
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.files import write_json
from slzo.module import ZOModule
from slzo.report.run_files import HISTORY_FILE
from slzo.runtime import peak_memory_gb


class RunHistory(Callback):
    """Writes ``history.json`` after each validation: ``points`` of step, evaluations, seconds, loss, metrics and peak memory.

    Seconds are those since training began, validations included, and GiB those of the first process. A run that goes on from
    a checkpoint begins with the points of the run before it.
    """

    def __init__(self) -> None:
        self._points: list[dict[str, Any]] = []
        self._started = time.monotonic()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin, with the points of the run that is continued."""
        self._points = _before(trainer)
        self._started = time.monotonic() - (self._points[-1]["seconds"] if self._points else 0.0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note what was found."""
        if trainer.state.fn != "fit" or trainer.sanity_checking or not isinstance(pl_module, ZOModule):
            return
        log_dir = trainer.log_dir  # a collective call: every process must make it
        found = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        loss = found.pop("val/loss", math.nan)
        self._points.append(
            {
                "step": trainer.global_step,
                "evaluations": pl_module.num_evaluations,
                "seconds": round(time.monotonic() - self._started, 2),
                "loss": loss if math.isfinite(loss) else None,
                "metrics": {name: value for name, value in found.items() if math.isfinite(value)},
                "peak_memory_gb": round(peak_memory_gb(pl_module.device), 3),
            }
        )
        if log_dir is not None and trainer.is_global_zero and not getattr(trainer, "fast_dev_run", False):
            write_json(Path(log_dir) / HISTORY_FILE, {"points": self._points})


def _before(trainer: Trainer) -> list[dict[str, Any]]:
    """The points that the continued run has up to its checkpoint."""
    if trainer.ckpt_path is None:
        return []
    path = Path(trainer.ckpt_path).parent.parent / HISTORY_FILE
    try:
        points = json.loads(path.read_text(encoding="utf-8"))["points"]
        return [point for point in points if point["step"] <= trainer.global_step]
    except (OSError, ValueError, KeyError, TypeError):  # of a former version, or damaged: the curve begins here
        return []
