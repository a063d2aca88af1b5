"""Writes predictions as JSON Lines, in the order of the held-out rows."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.callbacks.hooks import zo_module
from slzo.utils.console import rank_zero_print
from slzo.utils.files import output_file, replacing
from slzo.utils.pluralize import pluralize
from slzo.utils.process_group import gather_from_processes
from slzo.utils.run_layout import PREDICTIONS_FILE


class PredictionWriter(Callback):
    """Collects the records of predict_step from all processes in one file.

    Args:
        output: File to write; by default predictions.jsonl in the run's folder.

    Raises:
        SlzoError: The file cannot be written.
    """

    def __init__(self, output: str | None = None) -> None:
        self.output = None if output is None else output_file(output, PREDICTIONS_FILE)
        self._records: list[tuple[int, dict[str, Any]]] = []

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._records = []  # an interrupted prediction may have left some

    def on_predict_batch_end(self, trainer: Trainer, pl_module: LightningModule, outputs: Any, *_: Any) -> None:
        self._records.extend(outputs)

    def on_predict_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        zo_module(pl_module).parts.placement.barrier()
        records, self._records = gather_from_processes(self._records), []
        folder = Path(trainer.log_dir or trainer.default_root_dir)
        path = folder / PREDICTIONS_FILE if self.output is None else self.output
        if not trainer.is_global_zero:
            return
        with replacing(path) as partial, partial.open("w", encoding="utf-8") as file:
            for _, record in sorted(records, key=lambda item: item[0]):
                file.write(json.dumps(record, ensure_ascii=False) + "\n")
        rank_zero_print(f"Predictions {path} ({pluralize(len(records), 'row')})")
