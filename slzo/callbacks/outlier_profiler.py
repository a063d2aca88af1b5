"""Finds the dominant layer before training, with forward passes only."""

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger

from slzo.callbacks.hooks import zo_module
from slzo.lightning.trainer_state import folder_of
from slzo.report.profile_files import PLOT, profile_content, write_profile
from slzo.training.profiling import ProfileOptions
from slzo.utils.docs import with_lists
from slzo.zo.selection import RULES, Auto, SelectionRule


@with_lists(RULES=RULES)
class OutlierProfiler(Callback):
    """Measures activation outliers of every decoder layer and lets a rule choose the layer to tune.

    Reports how clear the choice is, in standard errors over the sequences, and problems with the prompts.

    :func:`slzo.fit.prepare` profiles the model; this callback holds the options, writes the profile to the run's folder and
    keeps it in checkpoints. If model.layer is set, the profile is only drawn. If model.scope needs no layer, there is no
    profile. A resumed run takes layer and profile from its checkpoint. Rules that train layers (Race, and Auto in doubt) also
    work with a plain Lightning Trainer.

    Args:
        rule: {RULES}, or your own SelectionRule; by default Auto.
        num_sequences: Prompts to average over, at least 10; all of them if there are fewer. Prompts of one token are left out.
        text_file: Take sequences from this file, one per line, instead of the task's prompts.
    """

    def __init__(
        self, rule: SelectionRule | None = None, num_sequences: int = 16, text_file: str | None = None
    ) -> None:
        self.options = ProfileOptions(Auto() if rule is None else rule, num_sequences, text_file)
        self.profile: dict[str, Any] | None = None  # content of outlier_profile.json

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the profile; a resumed run has it from its checkpoint."""
        module, folder = zo_module(pl_module), folder_of(trainer)
        prepared = module.prepared
        profile, choice = prepared.chosen.profile, prepared.chosen.choice
        if not prepared.resumed:
            self.profile = None if profile is None or choice is None else profile_content(profile, choice)
        if self.profile is None or folder is None or not trainer.is_global_zero:
            return
        write_profile(folder, self.profile, choice, prepared.options.model, module.datamodule.task.name)
        log_plot(trainer, PLOT, folder / f"{PLOT}.png")

    def state_dict(self) -> dict[str, Any]:
        return {"profile": self.profile}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.profile = state_dict["profile"]


def log_plot(trainer: Trainer, name: str, file: Path) -> None:
    """Send a PNG file to every logger that accepts images."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            from matplotlib.image import imread

            logger.experiment.add_image(name, imread(file)[..., :3], dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(file))
