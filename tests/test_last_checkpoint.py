"""Checkpoints between validations: a resumed run is the one that was never stopped, and little is lost."""

import shutil

import pytest
import torch
from conftest import run_dir, tuned
from lightning.pytorch import Callback
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slzo.__main__ import main
from slzo.callbacks.last_checkpoint import LastCheckpoint

COPIES = "copies"


class KeepEach(Callback):
    """Copies last.ckpt after each step's start, by the step it is of."""

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        """See Lightning."""
        last = run_dir() / "checkpoints" / "last.ckpt"
        if last.is_file():
            step = torch.load(last, weights_only=True)["global_step"]
            shutil.copy(last, f"{COPIES}/{step}.ckpt")


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Copies of all checkpoints of the first run."""
    original = LastCheckpoint.on_train_batch_start

    def keep(self, trainer, *args):
        original(self, trainer, *args)
        KeepEach().on_train_batch_start(trainer, *args)

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", keep)
    (tmp_path / COPIES).mkdir()
    return tmp_path / COPIES


def events_of(number):
    """Every scalar of training and validation that does not measure time, by name: steps and values."""
    accumulator = EventAccumulator(str(run_dir(number)), {"scalars": 0})
    accumulator.Reload()
    timed = ("seconds", "per_second", "memory", "test/")
    names = [name for name in accumulator.Tags()["scalars"] if not any(word in name for word in timed)]
    return {name: [(e.step, e.value) for e in accumulator.Scalars(name)] for name in names}


@pytest.mark.parametrize(
    "schedule",
    [
        ["--trainer.max_steps=12", "--trainer.val_check_interval=4"],
        [
            "--trainer.max_steps=-1",
            "--trainer.max_epochs=3",
            "--trainer.val_check_interval=1.0",
            "--trainer.check_val_every_n_epoch=2",
        ],
    ],
)
def test_a_run_resumed_between_validations_logs_and_validates_as_if_never_stopped(options, kept, schedule):
    options = [*options, *schedule, "--trainer.enable_progress_bar=false", "--model.engine.cache_gb=0"]
    assert main(["fit", *options, "--last_checkpoint.every_n_steps=1"]) == 0
    whole, logged = tuned(run_dir() / "checkpoints" / "last.ckpt"), events_of(0)
    steps = sorted(int(path.stem) for path in kept.glob("*.ckpt"))
    assert len(steps) >= 11
    for number, step in enumerate((1, 3, 5, 7, 10), start=1):
        assert main(["fit", *options, f"--ckpt_path={kept / f'{step}.ckpt'}"]) == 0
        resumed = tuned(run_dir(number) / "checkpoints" / "last.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step
        # Lightning counts logged steps from 0
        later = {name: [entry for entry in values if entry[0] >= step] for name, values in logged.items()}
        assert events_of(number) == {name: values for name, values in later.items() if values}, step
