"""A run that a signal ended and that is resumed equals an uninterrupted one: events, validations, best checkpoint."""

import signal
from pathlib import Path

import pytest
import torch
from helpers import last_checkpoint, run_dir, summary, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.module import ZOModule
from slzo.utils.signals import signals_held

pytestmark = pytest.mark.usefixtures("listening")
# two epochs of 5 batches and a bit
STEPS = 12
TIMES = ("step_seconds", "tokens_per_second", "peak_memory_gb")


@pytest.fixture
def run(options):
    """Runs fit, with a signal or without."""
    options = [*options, f"--trainer.max_steps={STEPS}", "--trainer.enable_progress_bar=false"]
    options += ["--record.test_before=false", "--data.eval_batch_size=4"]

    def run(*more, **sent):
        sender = [f"--trainer.callbacks.{name}={value}" for name, value in sent.items()]
        chosen = ["--trainer.callbacks=signal_sender.SignalSender"] if sent else []
        return main(["fit", *options, *more, *chosen, *sender])

    return run


def events(*numbers):
    """Scalars of some runs by tag and step. A step that is taken again from the log must log the same."""
    found = {}
    for number in numbers:
        accumulator = EventAccumulator(str(run_dir(number)), size_guidance={"scalars": 0})
        accumulator.Reload()
        own = {}
        for tag in accumulator.Tags()["scalars"]:
            for event in accumulator.Scalars(tag) if not tag.endswith(TIMES) else ():
                # Lightning writes the epoch with every line of metrics
                assert (tag, event.step) not in own or tag == "epoch", "twice in one run"
                own[tag, event.step] = event.value
        assert all(own[key] == value for key, value in found.items() if key in own)
        found |= own
    return found


def outcome(*numbers):
    """What some runs, each of which continues the one before, came to."""
    found = summary(numbers[-1])
    same = {name: found[name] for name in ("score_after", "steps", "evaluations")}
    best = Path(found["best_checkpoint"]).name
    return events(*numbers), tuned(last_checkpoint(numbers[-1])), {**same, "best": best}


def assert_same(one, other):
    assert one[0] == other[0]
    assert all(torch.equal(one[1][name], other[1][name]) for name in one[1])
    assert one[2] == other[2]


_WHOLE = {}


@pytest.fixture
def whole(run):
    """The outcome of an uninterrupted run, kept over tests; then the next run is the first again."""

    def whole(*more):
        if more not in _WHOLE:
            assert run(*more) == 0
            _WHOLE[more] = outcome(0)
            run_dir(0).rename("whole")
        return _WHOLE[more]

    return whole


# where Lightning's counters differ: in a step before and after its update, before and in a validation, at the end of an epoch
# and of the run
PLACES = [
    ("on_train_batch_start", 3),
    ("on_before_optimizer_step", 3),
    ("on_train_batch_end", 4),
    ("on_train_batch_end", 5),
    ("on_validation_start", 5),
    ("on_validation_batch_start", 6),
    ("on_validation_batch_start", 10),
    ("on_validation_end", 6),
    ("on_train_epoch_end", 5),
    ("on_train_batch_end", 12),
    ("on_validation_batch_start", 12),
    ("on_train_end", 12),
]
USUAL = {(2, *PLACES[1]), (2, *PLACES[5])}
ALL = [(interval, *place) for interval in (1, 2, 5) for place in PLACES]


@pytest.mark.slow
def test_a_resumed_run_that_ends_in_its_final_scores_can_be_resumed(run, whole):
    """Its only step was the last one, so it has saved no state with steps left."""
    expected = whole("--trainer.val_check_interval=5")
    assert run("--trainer.val_check_interval=5", place="on_train_batch_start", step=STEPS - 2, number="SIGINT") == 130
    more = ["--trainer.val_check_interval=5", "--ckpt_path=last"]
    assert run(*more, place="on_train_end", step=STEPS, number="SIGINT") == 130
    assert [path.name for path in run_dir(1).rglob("last.ckpt*")] == ["last.ckpt"]
    assert run(*more) == 0
    assert_same(outcome(0, 1, 2), expected)


@pytest.mark.parametrize(
    ("interval", "place", "step"),
    [pytest.param(*case, marks=[] if case in USUAL else pytest.mark.slow) for case in ALL],
)
def test_a_resume_after_a_signal_leaves_no_trace(run, whole, interval, place, step):
    more = (f"--trainer.val_check_interval={interval}",)
    expected = whole(*more)
    if place.startswith("on_validation") and step % interval and step < STEPS:  # there is no such validation
        return
    assert run(*more, place=place, step=step) == 130
    assert run(*more, "--ckpt_path=last") == 0
    assert_same(outcome(0, 1), expected)


@pytest.mark.parametrize(
    "more",
    [
        pytest.param(("--trainer.max_steps=-1", "--trainer.max_epochs=3"), id="epochs"),
        pytest.param(("--trainer.limit_train_batches=3",), id="limited", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    ("place", "step"),
    [
        *(
            pytest.param(*place, marks=pytest.mark.slow)
            for place in [
                *PLACES,
                ("on_validation_batch_start", 9),
                ("on_before_optimizer_step", 8),
                ("on_validation_batch_start", 7),
            ]
        )
    ],
)
def test_validations_by_epochs(run, whole, more, place, step):
    """In every second epoch: after steps 7 and 9 of epochs of 5 batches, each of which is cut into 3 and 2."""
    more = (*more, "--trainer.check_val_every_n_epoch=2", "--trainer.val_check_interval=0.5")
    expected = whole(*more)
    if run(*more, place=place, step=step):
        assert run(*more, "--ckpt_path=last") == 0
        assert_same(outcome(0, 1), expected)


@pytest.mark.parametrize(
    "batch_size",
    [pytest.param(size, marks=pytest.mark.slow) for size in (32, 4)],
    ids=["one batch an epoch", "epochs of five batches"],
)
def test_two_resumes_from_the_last_step_of_an_epoch_keep_its_number(run, whole, batch_size):
    steps = -(-20 // batch_size)
    more = (f"--data.batch_size={batch_size}", "--trainer.max_steps=-1", "--trainer.max_epochs=4")
    expected = whole(*more)
    assert run(*more, place="on_train_batch_end", step=steps) == 130
    assert run(*more, "--ckpt_path=last", place="on_train_batch_end", step=3 * steps) == 130
    assert run(*more, "--ckpt_path=last") == 0
    assert_same(outcome(0, 1, 2), expected)


@pytest.mark.slow
def test_a_run_can_be_stopped_in_each_validation_and_by_sigterm(run, whole):
    more = ("--trainer.val_check_interval=4",)
    expected = whole(*more)
    assert run(*more, place="on_validation_batch_start", step=4, number="SIGTERM") == 143
    assert run(*more, "--ckpt_path=last", place="on_validation_batch_start", step=8) == 130
    assert run(*more, "--ckpt_path=last", place="on_validation_start", step=12, number="SIGTERM") == 143
    assert run(*more, "--ckpt_path=last") == 0
    assert_same(outcome(0, 1, 2, 3), expected)


def test_the_first_signal_waits_for_the_step_and_the_second_does_not(run, whole, capfd):
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    more = ("--trainer.val_check_interval=2",)
    expected = whole(*more)
    assert run(*more, place="on_before_optimizer_step", step=7, times=2) == 130
    error = capfd.readouterr().err
    assert "SIGINT: stopping after this step or validation; send it again to stop at once" in error
    assert "Traceback" not in error
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before
    # nothing is saved after the validation; the log has the step since then, and what was cut off is lost
    assert read_checkpoint(last_checkpoint()).content["global_step"] == 6
    assert run(*more, "--ckpt_path=last") == 0
    assert "Steps 6 to 6 are in the log" in capfd.readouterr().out
    assert_same(outcome(0, 1), expected)


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM"])
def test_other_commands_end_with_the_status_of_the_signal(options, monkeypatch, capsys, number):
    monkeypatch.setattr(ZOModule, "test_step", lambda *args: signal.raise_signal(getattr(signal, number)))
    assert main(["test", *options]) == 128 + getattr(signal, number)
    assert capsys.readouterr().err.endswith("slzo: interrupted\n")


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_waits_for_the_end_of_a_short_piece_of_work(number):
    seen, done = [], []
    before = signal.signal(number, lambda *_: seen.append(list(done)))
    try:
        with signals_held():
            signal.raise_signal(number)
            assert not seen
            done.append("drawn")
    finally:
        signal.signal(number, before)
    assert seen == [["drawn"]]
