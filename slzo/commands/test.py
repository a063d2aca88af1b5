"""``slzo test``."""

from slzo.cli.app import App


def test(app: App, ckpt_path: str | None = None) -> None:
    """Score held-out rows.

    Args:
        app: Trainer, model and rows.
        ckpt_path: Checkpoint whose tuned layer is scored, ``last`` or ``best``, the folder of a run, or an exported folder;
            without it the untuned model is scored.
    """
    app.trainer.test(app.model, datamodule=app.datamodule, ckpt_path=app.load_if_exported(ckpt_path))
