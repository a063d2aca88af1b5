"""``slzo profile``."""

from pathlib import Path

from slzo.callbacks.outlier_profiler import log_plot
from slzo.cli.app import App
from slzo.fit import profile_and_choose
from slzo.lightning.loggers import run_folder
from slzo.lightning.run_context import run_context
from slzo.report.profile_files import PLOT, profile_content, write_profile
from slzo.utils.console import rank_zero_print, rank_zero_warn


def profile(app: App) -> None:
    """Find the dominant layer without tuning it: print, draw and save the outlier profile.

    Args:
        app: Trainer, model and rows.

    Raises:
        SlzoError: The trainer has several devices, or the rule finds no layer.
    """
    app.check_one_process("profile")
    if app.model.options.layer is not None:
        rank_zero_warn(
            f"model.layer {app.model.options.layer}: is not used, because slzo profile chooses a layer by profiler.rule"
        )
    with run_folder(app.trainer, set()):
        parts, data = app.load()
        options, run = app.model.options, run_context(app.trainer, app.datamodule)
        chosen = profile_and_choose(parts, options, data, run)
        assert chosen.profile is not None and chosen.choice is not None
        log_dir = app.trainer.log_dir
        if log_dir is not None:
            content = profile_content(chosen.profile, chosen.choice)
            write_profile(Path(log_dir), content, chosen.choice, options.model, data.task.name)
            log_plot(app.trainer, PLOT, Path(log_dir) / f"{PLOT}.png")
            rank_zero_print(f"Files      {log_dir}")
        for logger in app.trainer.loggers:
            logger.finalize("success")
