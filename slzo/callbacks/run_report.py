"""Ends a run with its pictures and its page."""

from pathlib import Path

from lightning.pytorch import Callback, LightningModule, Trainer

from slzo.console import say
from slzo.module import ZOModule
from slzo.pictures.curves import curves_picture
from slzo.pictures.style import save
from slzo.report.page import REPORT_FILE, write_report
from slzo.report.run_files import read_run

CURVES = "curves"
"""Name of the picture, without .png and .svg."""


class RunReport(Callback):
    """Ends a run with curves.png, curves.svg and report.html, the page that slzo report writes.

    Comes after the callbacks whose files it reads.

    Args:
        write: Write them; slzo report RUN writes the page later too.
    """

    def __init__(self, write: bool = True) -> None:
        self.write = write

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Read what is in the run folder, draw and write."""
        stopped = trainer.interrupted or getattr(trainer, "fast_dev_run", False)
        if not self.write or stopped or not isinstance(pl_module, ZOModule):
            return
        log_dir = trainer.log_dir  # a collective call: every process must make it
        if log_dir is None or not trainer.is_global_zero:
            return
        folder = Path(log_dir)
        run = read_run(folder)
        svg = save(curves_picture([run.curves], f"{run.model} on {run.task}"), folder, CURVES)
        write_report([run], folder / REPORT_FILE, curves=svg)
        say(f"Report     {folder / REPORT_FILE}")
