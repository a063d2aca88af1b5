"""``slzo fit``."""

from slzo.cli.app import App


def fit(app: App, ckpt_path: str | None = None) -> None:
    """Find the dominant layer and tune it.

    Args:
        app: Trainer, model and rows.
        ckpt_path: Checkpoint or folder of a run to continue from, or ``last`` or ``best`` of the newest run.
    """
    app.trainer.fit(app.model, datamodule=app.datamodule, ckpt_path=ckpt_path)
