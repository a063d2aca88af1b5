"""``slzo predict``."""

from slzo.callbacks.prediction_writer import PredictionWriter
from slzo.cli.app import App


def predict(app: App, ckpt_path: str | None = None, output: str | None = None) -> None:
    """Write predictions of the held-out rows as JSON Lines.

    Args:
        app: Trainer, model and rows.
        ckpt_path: Checkpoint whose tuned layer is used, ``last`` or ``best``, the folder of a run, or an exported folder; without
            it the untuned model is used.
        output: File to write; by default predictions.jsonl in the run's folder.
    """
    app.trainer.callbacks.append(PredictionWriter(output))  # type: ignore[attr-defined]
    path = app.load_if_exported(ckpt_path)
    app.trainer.predict(app.model, datamodule=app.datamodule, return_predictions=False, ckpt_path=path)
