"""Writes what the model says to a few held-out rows before and after training."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.kept_weights import kept_weights
from slzo.evaluation.evaluator import records
from slzo.files import write_json
from slzo.module import ZOModule
from slzo.report.run_files import SAMPLES_FILE
from slzo.runtime import of_all_processes
from slzo.tasks.base import Example


class SamplePredictions(Callback):
    """Writes ``samples.json``: ``rows`` of id, prompt, gold (texts), and the predictions before and after training.

    The rows are the first held-out ones, and after training those of the best checkpoint. A run that goes on from a checkpoint
    has none of before: its weights are tuned already.

    Args:
        number: How many rows; 0 writes none.
    """

    def __init__(self, number: int = 8) -> None:
        self.number = number
        self._before: dict[int, dict[str, Any]] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the untuned model."""
        if self._wanted(trainer) and isinstance(pl_module, ZOModule) and not pl_module.resumed:
            self._before = self._ask(pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the tuned one, and write."""
        if not self._wanted(trainer) or not isinstance(pl_module, ZOModule) or trainer.interrupted:
            return
        log_dir = trainer.log_dir  # a collective call: every process must make it
        best = str(trainer.strategy.broadcast(getattr(trainer.checkpoint_callback, "best_model_path", "")))
        with kept_weights(pl_module, best):
            after = self._ask(pl_module)
        if log_dir is not None and trainer.is_global_zero and after:
            rows = [_row(record, self._before.get(place)) for place, record in sorted(after.items())]
            write_json(Path(log_dir) / SAMPLES_FILE, {"rows": rows})

    def _wanted(self, trainer: Trainer) -> bool:
        return self.number > 0 and not getattr(trainer, "fast_dev_run", False)

    def _ask(self, module: ZOModule) -> dict[int, dict[str, Any]]:
        """The record of each row by its position, those of all processes."""
        data, processes = module.datamodule, module.trainer.world_size
        if data.splits is None or len(data.splits.test) < processes:
            return {}
        found: list[tuple[int, dict[str, Any]]] = []
        # every process must have a row of its own
        for batch in data.eval_loader("test", max(self.number, processes)):
            moved = batch.to(module.device)
            written = records(moved, module.evaluator(moved))
            found += [
                (row.position, {**record, "gold": _gold(row.example)})
                for row, record in zip(batch.rows, written, strict=True)
            ]
        return dict(of_all_processes(found))


def _gold(example: Example) -> list[str]:
    """The right answers as texts."""
    return list(example.references) or [example.candidates[index].strip() for index in example.gold]


def _row(after: Mapping[str, Any], before: Mapping[str, Any] | None) -> dict[str, Any]:
    shown = {"id": after["id"], "prompt": after["prompt"], "gold": after["gold"]}
    asked = None if before is None else before["prediction_text"].strip()
    return {**shown, "before": asked, "after": after["prediction_text"].strip()}
