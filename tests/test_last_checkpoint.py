"""Checkpoints between validations: a resumed run is the one that was never stopped, and little is lost."""

import shutil
from itertools import count

import pytest
from helpers import last_checkpoint, run_dir, same_tensors, summary, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slzo.__main__ import main
from slzo.callbacks.checkpoints import LastCheckpoint
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.evaluation.evaluator import RunningScore


@pytest.fixture
def saved(monkeypatch, tmp_path):
    """Copies of ``last.ckpt`` of the first run before each step, by step."""
    original, folder = LastCheckpoint.on_train_batch_start, tmp_path / "copies"
    folder.mkdir()

    def keep(self, trainer, *args):
        original(self, trainer, *args)
        if last_checkpoint().is_file() and not trainer.ckpt_path:
            shutil.copy(last_checkpoint(), folder / f"{trainer.global_step}.ckpt")

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
        "--trainer.max_steps=12 --trainer.val_check_interval=4",
        pytest.param(
            "--trainer.max_steps=-1 --trainer.max_epochs=3 --trainer.val_check_interval=1.0 --trainer.check_val_every_n_epoch=2",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_a_run_resumed_between_validations_logs_and_validates_as_if_never_stopped(options, saved, schedule):
    options = [*options, *schedule.split(), "--trainer.enable_progress_bar=false", "--model.engine.cache_gb=0"]
    assert main(["fit", *options, "--last_checkpoint.every_n_steps=1"]) == 0
    whole, logged = tuned(last_checkpoint()), events_of(0)
    for number, step in enumerate((5, 7), start=1):
        path = saved / f"{step}.ckpt"
        assert read_checkpoint(path).content["global_step"] == step
        assert main(["fit", *options, f"--ckpt_path={path}"]) == 0
        resumed = tuned(last_checkpoint(number))
        assert same_tensors(whole, resumed), step
        # Lightning counts logged steps from 0
        later = {name: [entry for entry in values if entry[0] >= step] for name, values in logged.items()}
        assert events_of(number) == {name: values for name, values in later.items() if values}, step


@pytest.mark.slow
@pytest.mark.parametrize("epochs", [(1, 2), (1, 1, 3)], ids=str)
def test_a_last_validation_outside_of_the_schedule_does_not_count_in_a_longer_run(options, epochs):
    """An epoch has five steps, and the schedule validates every second one."""
    options = [*options, "--trainer.max_steps=-1", "--trainer.log_every_n_steps=1", "--record.test_before=false"]
    for number, limit in enumerate(epochs):
        resumes = ["--ckpt_path=last"] if number else []
        assert main(["fit", *options, f"--trainer.max_epochs={limit}", *resumes]) == 0
        assert read_checkpoint(last_checkpoint(number)).content["global_step"] == 5 * limit
    assert main(["fit", *options, f"--trainer.max_epochs={epochs[-1]}"]) == 0
    first, last = 5 * epochs[-2], len(epochs)
    whole, resumed = events_of(last), events_of(last - 1)
    assert same_tensors(tuned(last_checkpoint(last - 1)), tuned(last_checkpoint(last)))
    for name in ("train/loss", "val/loss"):
        assert resumed[name] == [entry for entry in whole[name] if entry[0] >= first]


@pytest.mark.parametrize(
    ("minutes", "steps"), [pytest.param(1, [1, 3, 5, 7], marks=pytest.mark.slow), (1.5, [1, 4, 7]), (0, [1])]
)
def test_a_state_is_saved_every_so_many_minutes(options, saved, monkeypatch, minutes, steps):
    """A step takes half a minute on this clock."""

    class Clock:
        now = 0.0

        @classmethod
        def monotonic(cls):
            return cls.now

    def on_train_batch_start(self, *args, original=LastCheckpoint.on_train_batch_start):
        Clock.now += 30
        original(self, *args)

    monkeypatch.setattr(LastCheckpoint, "on_train_batch_start", on_train_batch_start)
    monkeypatch.setattr("slzo.callbacks.checkpoints.time", Clock)
    args = ["--trainer.max_steps=9", "--trainer.val_check_interval=9"]
    assert main(["fit", *options, *args, f"--last_checkpoint.every_minutes={minutes}"]) == 0
    found = {int(path.stem): read_checkpoint(path).content["global_step"] for path in saved.glob("*.ckpt")}
    assert sorted(set(found.values())) == steps
    assert all(before <= step for step, before in found.items())
    assert read_checkpoint(last_checkpoint()).content["global_step"] == 9


@pytest.mark.parametrize("longer", [5, pytest.param(6, marks=pytest.mark.slow)])
def test_the_best_checkpoint_of_the_last_validation_is_known_afterwards(options, longer, monkeypatch):
    """The schedule has none after step 3; it is the best one, for which the older file is deleted."""
    falling = count(1000, -1)
    monkeypatch.setattr(RunningScore, "compute", lambda self: {"loss": float(next(falling)), "accuracy": 0.5})
    options = [*options, "--trainer.val_check_interval=2", "--checkpoint.monitor=val/loss", "--checkpoint.mode=min"]
    assert main(["fit", *options, "--trainer.max_steps=3"]) == 0
    best = run_dir() / "checkpoints/step=3.ckpt"
    assert [path.name for path in best.parent.glob("step=*.ckpt")] == [best.name]
    assert main(["fit", *options, f"--trainer.max_steps={longer}", f"--ckpt_path={last_checkpoint()}"]) == 0
    unbroken = [*options, f"--trainer.max_steps={longer}"]
    assert main(["fit", *unbroken]) == 0
    resumed, whole = tuned(last_checkpoint(1)), tuned(last_checkpoint(2))
    assert same_tensors(whole, resumed)
    for number in (1, 2):
        callbacks = read_checkpoint(last_checkpoint(number)).content["callbacks"].values()
        paths = [state["best_model_path"] for state in callbacks if "best_model_path" in state]
        assert [path.endswith(f"step={longer}.ckpt") for path in paths] == [True]
    assert main(["export", "--ckpt_path=best", "--output=exported"]) == 0


def test_the_last_weights_are_not_reported_as_a_best_checkpoint_that_is_missing(options, monkeypatch, capsys):
    losses = count(1, 1)
    monkeypatch.setattr(RunningScore, "compute", lambda self: {"loss": float(next(losses)), "accuracy": 0.5})
    options = [*options, "--guard.factor=null", "--record.test_before=false"]
    assert main(["fit", *options, "--trainer.max_steps=2"]) == 0
    best = run_dir() / "checkpoints/step=2.ckpt"
    assert summary()["best_checkpoint"] == str(best)
    best.unlink()
    assert main(["fit", *options, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert f"the best checkpoint {str(best.absolute())!r} is missing" in capsys.readouterr().err
    assert summary(1)["best_checkpoint"] is None
    assert str(last_checkpoint(1)) in summary(1)["use"][-1]
