"""Pictures for loggers that take some."""

from pathlib import Path

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from matplotlib.image import imread


def log_picture(trainer: Trainer, name: str, file: Path) -> None:
    """Give a PNG file to every logger that takes pictures."""
    for logger in trainer.loggers:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(name, imread(file)[..., :3], dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(name, [str(file)])
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_artifact(logger.run_id, str(file))
