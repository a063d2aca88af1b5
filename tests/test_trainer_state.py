"""What is known of a Lightning trainer, compared with what it does."""

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.demos.boring_classes import BoringModel

from slzo.lightning.trainer_state import validation_due

pytestmark = pytest.mark.fast


class Validations(Callback):
    """Steps after which a validation was due, and steps after which Lightning made one."""

    def __init__(self):
        self.due, self.made = [], []

    def on_train_batch_end(self, trainer, *_):
        if validation_due(trainer):
            self.due.append(trainer.global_step)

    def on_validation_start(self, trainer, _):
        self.made.append(trainer.global_step)


@pytest.mark.parametrize("limit", [1.0, 3, 0])
@pytest.mark.parametrize(
    ("interval", "every_n_epochs"),
    [(1.0, 1), (1.0, 3), (0.5, 1), (0.4, 2), (2, 1), (2, 2), (5, 1), (2, None), (3, None), (7, None), (99, None)],
)
def test_validations_are_due_when_lightning_makes_them(interval, every_n_epochs, limit):
    """An epoch has five batches, and the last one ends after two."""
    seen = Validations()
    trainer = Trainer(
        max_steps=17,
        max_epochs=-1,
        val_check_interval=interval,
        check_val_every_n_epoch=every_n_epochs,
        limit_train_batches=5,
        limit_val_batches=limit,
        num_sanity_val_steps=0,
        callbacks=[seen],
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
        accelerator="cpu",
    )
    trainer.fit(BoringModel())
    assert seen.due == seen.made
    assert bool(seen.made) == (limit != 0 and interval != 99)
