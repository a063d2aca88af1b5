"""Keeps the best state of a run, and the newest in ``checkpoints/last.ckpt``, whatever ends the run."""

from pathlib import Path
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint

from slzo.console import say
from slzo.errors import Interrupted, SlzoError


class BestCheckpoint(ModelCheckpoint):
    """Lightning's ModelCheckpoint; a resumed run remembers the best state although it writes to a folder of its own."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over the best score and path; the file of the former run is never deleted."""
        for name in ("best_model_score", "best_model_path", "best_k_models", "kth_best_model_path", "kth_value"):
            setattr(self, name, state_dict[name])


class LastCheckpoint(Checkpoint):
    """Saves after every validation, at the end, and when the run is interrupted.

    Lightning's ``ModelCheckpoint(save_last=True)`` saves only when the monitored value improved, so a resume could lose steps.
    As a ``Checkpoint`` it runs after :class:`BestCheckpoint`, whose state it saves.
    """

    def __init__(self) -> None:
        self._saved_step = -1

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save while training."""
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the last step."""
        self._save(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save what an interrupt or a crash would lose; not the weights of a diverged run."""
        if isinstance(exception, SlzoError) or trainer.global_step == 0 or trainer.world_size > 1:
            return
        if isinstance(exception, Interrupted) and not exception.saves:  # within a step
            return
        path = self._save(trainer)
        if path is not None:
            say(f"\nInterrupted at step {trainer.global_step}; continue with the same command and --ckpt_path {path}")

    def _save(self, trainer: Trainer) -> Path | None:
        log_dir = trainer.log_dir  # a collective call: every process must make it
        if log_dir is None or getattr(trainer, "fast_dev_run", False):
            return None
        path = Path(log_dir) / "checkpoints" / "last.ckpt"
        if self._saved_step != trainer.global_step:
            partial = path.with_suffix(".partial")
            trainer.save_checkpoint(partial, weights_only=False)
            if trainer.is_global_zero:
                partial.replace(path)
            self._saved_step = trainer.global_step
        return path
