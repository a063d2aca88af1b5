"""``slzo profile``."""

from pathlib import Path

from slzo.callbacks.outlier_profiler import log_picture
from slzo.cli.app import App
from slzo.fit import make_trials
from slzo.loggers import run_folder
from slzo.profiling import profile_model
from slzo.report.profile_files import PICTURE, format_profile, write_profile
from slzo.utils.console import say
from slzo.utils.errors import SlzoError


def profile(app: App) -> None:
    """Find the dominant layer without tuning it: print, draw and save the outlier profile.

    Args:
        app: Trainer, model and rows.
    """
    with run_folder(app.trainer, set()):
        parts, rows = app.load()
        options, run = app.model.options, app.run_context()
        assert run.profiler is not None
        found, choice = profile_model(parts, rows, run.profiler, make_trials(parts, options, rows, run))
        say(format_profile(found))
        if choice.layer < 0:
            raise SlzoError(choice.reason)
        log_dir = app.trainer.log_dir
        if log_dir is not None:
            write_profile(Path(log_dir), found, choice, options.model, rows.task.name)
            log_picture(app.trainer, PICTURE, Path(log_dir) / f"{PICTURE}.png")
            say(f"Files      {log_dir}")
        for logger in app.trainer.loggers:
            logger.finalize("success")
