"""The last step is always validated, and the start says what a run will take."""

import json

import pytest
from conftest import run_dir
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from slzo.__main__ import main
from slzo.callbacks.run_forecast import Forecast, duration


def validated(number=0):
    return [v["step"] for v in json.loads((run_dir(number) / "summary.json").read_text())["validations"]]


def test_the_last_step_is_validated(options):
    short = [*options, "--trainer.enable_progress_bar=false", "--trainer.max_steps=7", "--trainer.val_check_interval=4"]
    assert main(["fit", *short]) == 0
    assert validated() == [4, 7]
    events = EventAccumulator(str(run_dir()))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [3, 6]  # Lightning counts from 0
    # without steps left nothing is done again; with more, the interval goes on
    assert main(["fit", *short, "--ckpt_path=last"]) == 0
    assert validated(1) == []
    assert main(["fit", *short, "--trainer.max_steps=9", f"--ckpt_path={run_dir()}/checkpoints/last.ckpt"]) == 0
    assert validated(2) == [8, 9]
    assert main(["fit", *short, "--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false"]) == 0
    assert validated(3) == []
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=2"]
    assert main(["fit", *short, *epochs, "--trainer.val_check_interval=1.0"]) == 0
    assert validated(4) == [5]


def test_a_run_says_what_it_will_take(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=12", "--trainer.val_check_interval=5"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Expect")]
    assert "8 steps of" in line
    assert "2 validations of" in line
    assert "memory about" in line
    assert main(["fit", *options, "--trainer.max_steps=6"]) == 0
    assert "Expect" not in capsys.readouterr().out


def test_a_forecast_adds_up():
    known = Forecast(100, 0.5, 4, 0.1, 20, 50, 1.26)
    assert known.seconds == pytest.approx(100 * 0.5 + (4 * 20 + 50) * 0.1)
    assert known.line() == (
        "Expect     up to 1 min 3 s more (100 steps of 0.5 s, 4 validations of 2 s, held-out rows 5 s); memory about 1.3 GiB"
    )
    assert "4 validations and 50 held-out rows not counted" in Forecast(100, 0.5, 4, None, 20, 50, 1.0).line()
    assert [duration(s) for s in (59.4, 200, 7500)] == ["59 s", "3 min 20 s", "2 h 5 min"]
