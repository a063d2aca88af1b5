"""Steps without progress cause a warning and end a run; skipped steps are in the summary; projected gradients can be clipped."""

import pytest
from helpers import error_line, last_checkpoint, run_fit, summary, tuned

from slzo.__main__ import main
from slzo.report.summary import format_summary
from slzo.zo import AutoStep


def test_eps_that_is_lost_in_rounding_is_told_at_once_and_ends_the_run(options, capsys):
    assert main(["fit", *options, "--model.eps=1e-12", "--trainer.max_steps=40"]) == 2
    *before, line = capsys.readouterr().err.strip().splitlines()
    (warned,) = [text for text in before if "projected gradient" in text]
    assert "exactly 0 at step 1," in warned
    assert "exactly 0 for 20 steps in a row, the last at step 20: model.eps 1e-12 is lost in rounding" in line


@pytest.mark.parametrize("shaping", ["zscore", pytest.param("rank", marks=pytest.mark.slow)])
def test_a_population_without_a_difference_is_told_and_moves_nothing(shaping, options, capsys):
    more = ["--model.estimator=EvolutionStrategy", f"--model.estimator.shaping={shaping}", "--model.num_queries=3"]
    assert main(["fit", *options, *more, "--model.eps=1e-12", "--trainer.max_steps=2"]) == 0
    assert "exactly 0 at step 1," in capsys.readouterr().err
    assert all(tensor.isfinite().all() for tensor in tuned(last_checkpoint()).values())


def test_weights_that_run_away_are_told(options, capsys):
    more = ["--model.optimizer.lr=1e6", "--trainer.max_steps=60", "--watch.max_zero_steps=5"]
    line = error_line(capsys, "fit", *options, *more)
    assert "exactly 0 for 5 steps in a row" in line
    assert "the tuned tensors grew by a factor of" in line
    assert "lower the learning rate (model.optimizer.lr 1e+06)" in line


@pytest.mark.parametrize("every", [1, 2, 10])
def test_a_monitor_of_a_value_that_no_step_logs_ends_the_run(every, options, capsys):
    watch = [f"--trainer.log_every_n_steps={every}", "--trainer.callbacks=EarlyStopping"]
    known = [
        *watch,
        "--trainer.callbacks.monitor=train/update_norm",
        "--trainer.callbacks.check_on_train_epoch_end=false",
    ]
    assert main(["fit", *options, *known]) == 0
    line = error_line(capsys, "fit", *options, *watch, "--trainer.callbacks.monitor=train/los")
    assert "EarlyStopping.monitor 'train/los': no such metric; choose one of train/" in line
    assert "train/loss, " in line
    assert "val/" not in line


def test_a_metric_that_no_direction_changes_does_not_end_a_run(options, capsys):
    more = ["--data.objective=metric", "--model.eps=1e-9", "--watch.max_zero_steps=3"]
    assert main(["fit", *options, *more]) == 0
    assert "did not change along any direction for 3 steps" in capsys.readouterr().err


def test_a_loss_at_its_lower_bound_stops_the_automatic_rate_and_is_told(options, capsys, monkeypatch):
    def add(self, estimate):
        self.loss = -0.1  # below the bound
        return 1.0

    monkeypatch.setattr(AutoStep, "add", add)
    auto = ["--model.eps=auto", "--model.optimizer.lr=auto", "--model.estimator=SPSA", "--trainer.max_steps=3"]
    assert main(["fit", *options, *auto]) == 0
    assert (
        capsys.readouterr().err.count("the automatic learning rate is 0 at step 1, because the loss is not above") == 1
    )


def test_skipped_steps_are_in_the_summary(options, once):
    once(run_fit, *options)
    assert "3 steps without a finite loss" in format_summary({**summary(), "skipped_steps": 3})
