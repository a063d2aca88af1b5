"""``slzo replay``."""

from slzo.cli.app import App
from slzo.experiments.replay import replay_run


def replay(app: App, run: str, step: int | None = None, output: str | None = None) -> None:
    """Rebuild the tuned weights of a run at any step from its log, without data or forward passes.

    Args:
        app: Options of the model, which are read from the run's folder.
        run: Folder of the run.
        step: Number of steps to replay; by default all steps of the log.
        output: Checkpoint to write, for validate, test, predict and export; by default checkpoints/replay-step=STEP.ckpt in
            the run's folder.
    """
    replay_run(app.model.options, app.datamodule, run, step, output, app.device)
