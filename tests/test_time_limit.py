"""trainer.max_time: steps and validations are planned for it, and a run ends in it."""

import itertools
import math
import time
from types import SimpleNamespace

import pytest
import yaml
from helpers import FakeTrials, error_line, last_checkpoint, layer_statistics, run_dir, same_tensors, summary, tuned

from slzo.__main__ import main
from slzo.callbacks import time_limit
from slzo.callbacks.defaults import with_defaults
from slzo.callbacks.time_limit import TimeLimit
from slzo.datamodule import TaskDataModule
from slzo.experiments.layer_trials import LayerTrials
from slzo.lightning.trainer import ZOTrainer
from slzo.lightning.trainer_checks import check_interval
from slzo.lightning.trainer_options import limit_defaults
from slzo.module import ZOModule
from slzo.training import timing
from slzo.training.time_plan import Passes, RunTimes, TimeBudget, TimePlan
from slzo.utils.errors import SlzoError
from slzo.zo.selection import Race


def plan(left=100.0, times=None, **budget):
    """A plan for steps of 0.1 s and validations of 2 s; 90 s are used of 100."""
    usual = {"step": 0.1, "validation": 2.0}
    return TimePlan.of(RunTimes(**(usual | (times or {}))), TimeBudget(100.0, 0.0, **budget), left)


# ---- the plan --------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
@pytest.mark.parametrize(
    ("times", "budget", "steps", "every", "validations"),
    [
        ({}, {}, 740, 93, 8),
        ({"before": 10.0, "after": 5.0}, {}, 590, 74, 8),
        ({"validation": 10.0}, {}, 700, 350, 2),  # a quarter of the time
        ({"validation": 40.0}, {}, 500, 500, 1),  # the last step is always validated
        ({"validation": 0.0}, {}, 900, 113, 0),
        ({"new_row": 0.5, "new_rows": 48, "rows_per_step": 16}, {}, 500, 63, 8),
        ({"step": 10.0}, {}, 7, 1, 7),
        ({}, {"every": 20}, 440, 20, 22),  # by hand: 22 times 2 s of steps and 2 s
        ({}, {"every_seconds": 2.0}, 440, 20, 22),
        ({}, {"every": 350, "sets_interval": False}, 840, None, 3),
        ({}, {"max_steps": 300, "every": 40}, 300, None, 8),
        ({}, {"max_steps": 300, "every_seconds": 10.0}, 300, 100, 3),
        ({}, {"max_steps": 880, "every": 400}, 740, 93, 8),  # more than the time allows
    ],
)
def test_a_plan_by_hand(times, budget, steps, every, validations):
    found = plan(times=times, **budget)
    assert (found.steps, found.every, found.validations) == (steps, every, validations)
    assert found.seconds <= 90


@pytest.mark.fast
def test_the_slowest_process_counts_for_each_time():
    times = [RunTimes(1.0, 0.5, 3, 16, 2.0, 1.0, 4.0), RunTimes(2.0, 0.1, 8, 16, 1.0, 5.0, 3.0)]
    assert RunTimes.slowest(times) == RunTimes(2.0, 0.5, 8, 16, 2.0, 5.0, 4.0)


@pytest.mark.fast
def test_a_continued_run_plans_the_steps_that_are_left():
    found = plan(done=500)
    assert (found.steps, found.new_steps) == (1240, 740)
    found = plan(done=500, max_steps=600, every=50)
    assert (found.steps, found.new_steps, found.every) == (600, 100, None)
    assert plan(done=600, max_steps=600, every=50).new_steps == 0


@pytest.mark.fast
@pytest.mark.parametrize("step", [0.01, 3.0])
@pytest.mark.parametrize("validation", [0.0, 0.5, 30.0])
@pytest.mark.parametrize("new_rows", [0, 1000])
@pytest.mark.parametrize("every", [1, 7, 1000])
def test_no_other_plan_with_these_validations_takes_more_steps(step, validation, new_rows, every):
    times = RunTimes(step, 0.02, new_rows, 16, validation, before=4.0, after=3.0)
    found = TimePlan.of(times, TimeBudget(300.0, 0.0, every=every), 250.0)
    assert found.seconds <= 0.9 * 250
    most = max(found.validations, 1)
    assert times.of_steps(found.steps + 1) + (most + 1) * validation + 7.0 > 0.9 * 250 - validation
    added = found.every is not None and found.every < every
    assert not added or found.validations * validation <= 250 / 4 or found.validations == 1
    assert found.validations <= max(8, math.ceil(found.steps / every))


@pytest.mark.fast
def test_the_least_time_is_enough_for_one_step():
    times = {"step": 7.0, "before": 20.0, "after": 15.0}
    found = plan(left=40.0, times=times)
    assert found.new_steps == 0
    assert plan(left=40.0 + found.least - 100.0, times=times).new_steps == 1
    assert plan(left=-5.0).new_steps == 0


# ---- what is measured ------------------------------------------------------------------------------------------------------


def test_first_passes_show_what_a_new_row_costs(options, monkeypatch):
    """40 rows in batches of 8, 16 dev and 24 held-out rows; a first pass takes 3 s, others 1 s."""
    found, seen = [], set()

    def seconds(work):
        work()
        batch = work.args[0]
        new = id(batch) not in seen
        seen.add(id(batch))
        kept.append(batch)  # so that no other batch gets its id
        return 3.0 if new else 1.0

    kept = []
    monkeypatch.setattr(timing, "_seconds", seconds)
    measure = timing.measure_times
    monkeypatch.setattr("slzo.training.timing.measure_times", lambda *args: found.append(measure(*args)) or found[-1])
    assert main(["fit", *options, "--trainer.max_time=01:00:00:00", "--model.layer=2"]) == 0
    (times,) = found
    assert (times.step, times.new_row, times.rows_per_step) == (1.005, 2.0 / 8, 8)
    assert times.new_rows == 8  # four of five batches were measured
    batches = times.validation  # 1 s a batch of dev rows
    assert batches == int(batches)
    assert times.before > 2 * batches  # the guard's pass, what is new in it, and the held-out rows
    assert times.after > 2.0


@pytest.mark.slow
def test_only_the_dev_batches_that_are_scored_are_planned(options, monkeypatch):
    """16 dev rows in batches of about one row; scoring a batch takes 1 s."""
    found, measure = [], timing.measure_times
    monkeypatch.setattr(timing, "_seconds", lambda work: work() and 1.0)
    monkeypatch.setattr("slzo.training.timing.measure_times", lambda *args: found.append(measure(*args)) or found[-1])
    limited = ["--trainer.max_time=01:00:00:00", "--model.layer=2", "--data.eval_batch_tokens=16"]
    for limit in (1.0, 3):
        assert main(["fit", *options, *limited, f"--trainer.limit_val_batches={limit}"]) == 0
    assert found[0].validation > found[1].validation == 3.0


@pytest.mark.slow
def test_a_time_that_is_long_enough_changes_nothing(options):
    options = [*options, "--model.estimator=SPSA", "--model.eps=auto"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_time.hours=1"]) == 0
    one, other = (tuned(last_checkpoint(number)) for number in (0, 1))
    assert same_tensors(one, other)
    assert (run_dir(0) / "zo_log").read_bytes() == (run_dir(1) / "zo_log").read_bytes()
    assert summary(0)["evaluations"] == summary(1)["evaluations"]


# ---- a run -----------------------------------------------------------------------------------------------------------------


@pytest.fixture
def measured(monkeypatch):
    """Pretend that the parts of a run take these times."""

    def pretend(**times):
        known = RunTimes(**times)
        for module in ("slzo.training.timing", "slzo.experiments.layer_trials"):
            monkeypatch.setattr(f"{module}.measure_times", lambda *_: known)

    return pretend


def test_everything_of_a_run_is_planned_for_its_time(options, measured, capsys):
    measured(step=300.0, validation=150.0, after=9.0, rows_per_step=8)  # 3,231 s: 8 steps, and 5 validations at most
    unlimited = [option for option in options if "max_steps" not in option and "val_check" not in option]
    assert main(["fit", *unlimited, "--model.eps=1e-2", "--model.layer=2", "--trainer.max_time=00:01:00:00"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Plan ")]
    assert (
        "8 steps of 3e+02 s, 4 validations of 1.5e+02 s, one every 2 steps, other scores 9 s: about 50 min 9 s of"
        in line
    )
    assert [each["step"] for each in summary()["validations"]] == [2, 4, 6, 8]
    saved = yaml.safe_load((run_dir() / "config.yaml").read_text())["trainer"]
    assert [saved[name] for name in ("max_steps", "max_time", "val_check_interval")] == [-1, *["00:01:00:00"] * 2]
    assert main(["replay", "--run=runs/version_0"]) == 0
    one, other = (tuned(path) for path in (last_checkpoint(), run_dir() / "checkpoints" / "replay-step=8.ckpt"))
    assert same_tensors(one, other)


def test_a_run_that_is_slower_than_planned_ends_in_time_and_goes_on_later(options, measured, monkeypatch, capsys):
    measured(step=0.5, validation=1.0, after=30.0, rows_per_step=8)
    clock = itertools.count(time.monotonic(), 20)  # each look at the clock takes 20 s
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    run = ["fit", *options, "--trainer.max_steps=-1", "--trainer.val_check_interval=500", "--model.layer=2"]
    assert main([*run, "--trainer.max_time=00:00:06:40"]) == 0
    said = capsys.readouterr().out
    done = summary()["steps"]
    assert 2 < done < 20
    assert f"Stopping after step {done} of " in said
    assert [each["step"] for each in summary()["validations"]] == [done]
    monkeypatch.setattr(time_limit, "time", time)
    measured(step=900.0, validation=10.0, rows_per_step=8)  # 3 steps in an hour
    assert main([*run, "--trainer.max_time.hours=1", "--ckpt_path=last"]) == 0
    assert summary(1)["steps"] == done + 3
    assert "3 steps of 9e+02 s" in capsys.readouterr().out


def test_too_little_time_is_refused_in_one_line(options, measured, capsys):
    measured(step=300.0, validation=150.0, before=100.0, after=50.0)
    line = error_line(capsys, "fit", *options, "--trainer.max_time.minutes=5", "--model.layer=2")
    assert "trainer.max_time 5 min 0 s: too short for one step" in line
    assert pytest.approx(int(line.split("give at least ")[1].split()[0]), abs=2) == 600 * 1.1 / 0.9 / 60
    assert not run_dir().exists()
    # over before the profile
    line = error_line(capsys, "fit", *options, "--trainer.max_time.seconds=1", "--trainer.max_time.milliseconds=-999")
    assert "trainer.max_time 0 s: loading took" in line


def test_a_trainer_in_python_gets_its_limits_back():
    trainer = ZOTrainer(max_time={"minutes": 5}, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    (limit,) = [each for each in trainer.callbacks if isinstance(each, TimeLimit)]
    assert (limit.seconds, limit.every_seconds, trainer.max_steps, trainer.max_epochs) == (300.0, 300.0, -1, -1)
    given = trainer.max_steps, trainer.val_check_interval
    limit.begin()
    for each in (plan(), plan(max_steps=5)):  # Lightning's trainer prepares a run that it continues twice
        limit.apply(trainer, each)
    assert (trainer.max_steps, trainer.val_check_interval) == (5, 93)
    assert limit.given(trainer) == given
    limit.teardown(trainer, None, "fit")
    assert (trainer.max_steps, trainer.val_check_interval) == given


@pytest.mark.fast
@pytest.mark.parametrize(
    ("left", "step", "validates", "stops"),
    [
        (34.0, 1.0, False, True),  # a tenth more than 1 + 10 + 20 s
        (35.0, 1.0, False, False),
        (35.0, 5.0, False, True),  # the last step was slower than planned
        (45.0, 1.0, True, True),  # one validation comes now, and one at the end
        (46.0, 1.0, True, False),
    ],
)
def test_a_run_stops_where_another_step_and_all_after_it_do_not_fit(left, step, validates, stops, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(time_limit, "validation_due", lambda trainer: validates)
    trainer = ZOTrainer(max_steps=9, logger=False, enable_checkpointing=False, enable_progress_bar=False)
    limit = TimeLimit(step + left)
    limit.begin()
    limit.apply(trainer, plan(times={"step": 1.0, "validation": 10.0, "after": 20.0}))
    limit.on_train_batch_start()
    clock.now = step
    limit.on_train_batch_end(trainer)
    assert trainer.should_stop is stops


@pytest.mark.fast
def test_another_fit_of_a_trainer_has_the_whole_time(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time_limit, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(time_limit, "validation_due", lambda trainer: False)
    trainer, limit = ZOTrainer(max_steps=9, logger=False, enable_checkpointing=False), TimeLimit(100.0)
    for begin in (0.0, 150.0):
        clock.now, trainer.should_stop = begin, False
        limit.begin()
        clock.now += 50.0  # the time of loading counts
        limit.setup(trainer, None, "fit")
        for later, stops in ((99.0, False), (101.0, True)):
            clock.now = begin + later
            limit.on_train_batch_end(trainer)
            assert trainer.should_stop is stops
        limit.teardown(trainer, None, "fit")


def test_another_fit_of_a_trainer_takes_its_own_steps(model_dir, data_dir, own_folder, measured):
    measured(step=900.0, rows_per_step=8)  # 3 steps in an hour
    rows = {"data_dir": str(data_dir), "tokenizer": str(model_dir), "num_train": 40, "num_dev": 0, "num_test": 4}
    data, model = TaskDataModule("sst2", batch_size=8, **rows), ZOModule(str(model_dir), layer=2, eps=1e-3, seed=0)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = ZOTrainer(max_time={"hours": 1}, accelerator="cpu", **quiet)
    for steps in (3, 6):
        trainer.fit(model, datamodule=data)
        assert (trainer.global_step, trainer.max_steps) == (steps, -1)


@pytest.mark.fast
def test_the_time_alone_limits_unless_steps_are_given():
    assert limit_defaults({"max_time": "00:01:00:00"}) == {"max_steps": -1, "val_check_interval": "00:01:00:00"}
    assert limit_defaults({"max_time": {"hours": 1}, "max_steps": -1})["max_steps"] == -1
    by_epoch = {"max_steps": -1, "val_check_interval": 1.0}
    assert limit_defaults({"max_time": "00:01:00:00", "check_val_every_n_epoch": 1}) == by_epoch
    assert limit_defaults({"max_time": "00:01:00:00", "max_steps": 9}) == {}
    assert limit_defaults({"max_steps": -1}) == limit_defaults({"max_time": None}) == {}
    assert limit_defaults({"max_epochs": 3}) == {"max_steps": -1}


@pytest.mark.fast
@pytest.mark.parametrize("value", ["10 minutes", {"fortnights": 1}, {"minutes": 0}, {"days": 1e30}])
def test_a_time_that_cannot_be_used_is_named(value):
    with pytest.raises(SlzoError, match=r"trainer\.max_time .*give DD:HH:MM:SS"):
        ZOTrainer(max_time=value)


@pytest.mark.fast
def test_validations_by_time_need_no_steps_between_them():
    check_interval(SimpleNamespace(check_val_every_n_epoch=None), 5)  # such a trainer has no val_check_interval
    unlimited = ZOTrainer(val_check_interval={"minutes": 1}, logger=False, enable_progress_bar=False)
    check_interval(unlimited, 5)
    limited = ZOTrainer(
        val_check_interval={"minutes": 1}, max_time={"hours": 1}, logger=False, enable_progress_bar=False
    )
    assert next(each for each in limited.callbacks if isinstance(each, TimeLimit)).every_seconds == 60


@pytest.mark.slow
def test_a_run_validates_by_the_clock(options, capsys):
    """Then it has no rollbacks, unless its time is limited, which plans validations as steps."""
    by_time = [*options, "--trainer.max_steps=1", "--trainer.val_check_interval=00:00:10:00"]
    cases = (([], True), (["--guard.factor=null"], False), (["--trainer.max_time=00:00:20:00"], False))
    for number, (more, is_told) in enumerate(cases):
        assert main(["fit", *by_time, *more]) == 0
        assert ("does not roll back" in capsys.readouterr().err) == is_told
        assert summary(number)["steps"] == 1


@pytest.mark.fast
def test_the_limit_stops_a_run_before_its_last_state_is_saved():
    names = [type(each).__name__ for each in with_defaults([TimeLimit(9.0)])]
    assert names.index("RunRecord") < names.index("TimeLimit") < names.index("BestCheckpoint")
    known = (getattr(each, "passes", Passes()) for each in with_defaults([]))
    assert sum(known, Passes()) == Passes(dev_before=1, test_before=1, test_after=1)


# ---- a race ----------------------------------------------------------------------------------------------------------------


@pytest.mark.fast
def test_a_race_is_part_of_the_time():
    asked = []

    class Timed(FakeTrials):
        def planned_steps(self, layer, share=0.0):
            asked.append((layer, share))
            return 250

    layers = layer_statistics(*[(1, 1)] * 30)
    trials = Timed({})
    found = Race(layers=[5, 29]).plan(layers, trials)
    assert asked == [(found.reference, 0.25)]
    assert found == Race(layers=[5, 29]).plan(layers, FakeTrials({}, steps=250))


@pytest.mark.fast
@pytest.mark.parametrize(
    ("seconds", "limit", "steps"), [(900.0, 160, 160), (20.0, 160, 144), (20.0, -1, 144), (900.0, -1, 6480)]
)
def test_steps_that_all_fit_next_to_a_race_are_planned_as_without_a_limit_of_time(seconds, limit, steps):
    """Steps of 0.1 s; the race takes a fifth of the time, and a tenth is left over."""
    budget = TimeBudget(seconds, time.monotonic() + seconds, max_steps=limit)
    trials = SimpleNamespace(time=budget, _times={2: RunTimes(step=0.1)})
    assert LayerTrials.planned_steps(trials, 2, 0.25) == pytest.approx(steps, abs=1)


def test_a_race_plans_with_the_steps_that_the_time_allows(options, measured, capsys):
    measured(step=100.0, rows_per_step=8)
    race = ["--profiler.rule=Race", "--profiler.rule.share=3", "--model.optimizer.lr=auto"]
    timed = ["--trainer.max_steps=-1", "--trainer.max_time.seconds=8888"]  # 79 steps, of which the race takes 3/4
    assert main(["profile", *options, *race, *timed]) == 0
    first = capsys.readouterr().out
    assert main(["profile", *options, *race, "--trainer.max_steps=19"]) == 0
    second = capsys.readouterr().out
    lines = [[line for line in out.splitlines() if line.startswith("Race ")] for out in (first, second)]
    assert lines[0] == lines[1] != []
