"""Checkpoints between validations: a resumed run is the one that was never stopped, and little is lost."""

import shutil

import pytest
import torch
from conftest import run_dir, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slzo.__main__ import main
from slzo.callbacks.last_checkpoint import LastCheckpoint


@pytest.fixture
def kept(monkeypatch, tmp_path):
    """Copies of all checkpoints of the first run, by step."""
    original, folder = LastCheckpoint.on_train_batch_start, tmp_path / "copies"
    folder.mkdir()

    def keep(self, trainer, *args):
        original(self, trainer, *args)
        last = run_dir() / "checkpoints" / "last.ckpt"
        if last.is_file() and not trainer.ckpt_path:
            shutil.copy(last, folder / f"{trainer.global_step}.ckpt")

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", keep)
    return folder


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
    for number, step in enumerate((3, 5, 10), start=1):
        assert main(["fit", *options, f"--ckpt_path={kept / f'{step}.ckpt'}"]) == 0
        resumed = tuned(run_dir(number) / "checkpoints" / "last.ckpt")
        assert all(torch.equal(whole[name], resumed[name]) for name in whole), step
        # Lightning counts logged steps from 0
        later = {name: [entry for entry in values if entry[0] >= step] for name, values in logged.items()}
        assert events_of(number) == {name: values for name, values in later.items() if values}, step


@pytest.mark.parametrize(("minutes", "saved"), [(1, [2, 4, 6]), (1.5, [3, 6]), (0, [])])
def test_by_minutes_at_most_so_much_is_lost(options, monkeypatch, minutes, saved):
    """A step takes half a minute on this clock."""
    now = iter(range(0, 10**6, 30))
    steps = []

    class Clock:
        @staticmethod
        def monotonic():
            return float(Clock.now)

    original = LastCheckpoint.on_train_batch_start

    def step(self, trainer, *args):
        Clock.now = next(now)
        before = self._saved_step
        original(self, trainer, *args)
        if self._saved_step != before:
            steps.append(self._saved_step)

    Clock.now = 0
    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", step)
    monkeypatch.setattr("slzo.callbacks.last_checkpoint.time", Clock)
    args = ["--trainer.max_steps=8", "--trainer.val_check_interval=8"]
    assert main(["fit", *options, *args, f"--last_checkpoint.every_minutes={minutes}"]) == 0
    assert steps == saved


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("every_n_steps=0", "must be at least 1"),
        ("every_minutes=-1", "must be 0 or more"),
        ("every_minutes=nan", "expected a number"),
    ],
)
def test_wrong_intervals_are_one_line(options, capsys, option, told):
    assert main(["fit", *options, f"--last_checkpoint.{option}"]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert "Traceback" not in error
