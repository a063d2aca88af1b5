"""How Lightning starts the processes of a trainer; the class of a launcher that copies this process has no public name."""

from lightning.pytorch import Trainer
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher


def copies_process(trainer: Trainer) -> bool:
    """Return whether the processes of a trainer are forked or spawned copies of this one."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)
