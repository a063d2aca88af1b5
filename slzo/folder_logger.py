"""What stands in the place of a logger where none is wanted: a run's own folder, in which nothing is logged."""

from typing import Any

from lightning.pytorch.loggers import CSVLogger


class FolderLogger(CSVLogger):
    """Names the folder of a run, for its config, profile, summary and checkpoints; logs nothing.

    Args:
        save_dir: Folder above the runs.
        name: Between the two; empty for none.
    """

    def __init__(self, save_dir: str, name: str = "") -> None:
        super().__init__(save_dir, name)

    def log_metrics(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        """Nothing."""

    def save(self) -> None:
        """Nothing."""

    def finalize(self, status: str) -> None:
        """Nothing."""
