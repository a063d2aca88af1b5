"""``slzo validate``."""

from slzo.cli.app import App


def validate(app: App, ckpt_path: str | None = None) -> None:
    """Score dev rows.

    Args:
        app: Trainer, model and rows.
        ckpt_path: Checkpoint whose tuned layer is scored, ``last`` or ``best``, the folder of a run, or an exported folder;
            without it the untuned model is scored.
    """
    app.trainer.validate(app.model, datamodule=app.datamodule, ckpt_path=app.load_if_exported(ckpt_path))
