"""Steps that mean nothing are told and end a run; jumps of the loss are in the summary; projected gradients can be clipped."""

import json

import pytest
import torch
from conftest import run_dir, tuned

from slzo.__main__ import main
from slzo.callbacks.step_watch import StepWatch
from slzo.zo.stepper import ProjectedGradHistory
from slzo.zo.estimators import Estimate


def test_eps_that_is_lost_in_rounding_is_told_at_once_and_ends_the_run(options, capsys, recwarn):
    assert main(["fit", *options, "--model.eps=1e-12", "--trainer.max_steps=40"]) == 2
    warned = [str(warning.message) for warning in recwarn if "projected gradient" in str(warning.message)]
    assert len(warned) == 1
    assert "exactly 0 at step 1," in warned[0]
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "exactly 0 for 20 steps in a row, the last at step 20: model.eps 1e-12 is lost in rounding" in line


@pytest.mark.parametrize("shaping", ["zscore", "rank"])
def test_a_population_without_a_difference_is_told_and_moves_nothing(shaping, options, recwarn):
    more = ["--model.estimator=EvolutionStrategy", f"--model.estimator.shaping={shaping}", "--model.num_queries=3"]
    assert main(["fit", *options, *more, "--model.eps=1e-12", "--trainer.max_steps=2"]) == 0
    assert "exactly 0 at step 1," in " ".join(str(warning.message) for warning in recwarn)
    assert all(tensor.isfinite().all() for tensor in tuned(run_dir() / "checkpoints" / "last.ckpt").values())


def test_weights_that_run_away_are_told(options, capsys):
    more = ["--model.optimizer.lr=1e6", "--trainer.max_steps=60", "--watch.max_zero_steps=5"]
    assert main(["fit", *options, *more]) == 2
    line = capsys.readouterr().err.strip().splitlines()[-1]
    assert "exactly 0 for 5 steps in a row" in line
    assert "the tuned tensors grew by a factor of" in line
    assert "lower the learning rate" in line


def test_a_metric_that_no_direction_changes_does_not_end_a_run(options, recwarn):
    more = ["--data.objective=metric", "--model.eps=1e-9", "--watch.max_zero_steps=3"]
    assert main(["fit", *options, *more]) == 0
    assert "changed along no direction for 3 steps" in " ".join(str(warning.message) for warning in recwarn)


def estimate(loss, *slopes):
    return Estimate(loss, loss, loss, slopes, 2, {"w": torch.tensor([sum(slopes)])})


def test_spikes_are_counted():
    watch = StepWatch()
    for step in range(30):
        watch._look_for_spike(9.0 if step == 20 else 5.0 if step == 25 else 0.7 + 0.01 * (step % 3), step + 1)
    assert watch.spikes == {"number": 2, "step": 21, "loss": 9.0, "usual": pytest.approx(0.71)}
    again = StepWatch()
    again.load_state_dict(watch.state_dict())
    assert again.state_dict() == watch.state_dict()


def test_spikes_and_skipped_steps_are_in_the_summary(options, capsys):
    from slzo.callbacks.run_summary import format_summary

    assert main(["fit", *options]) == 0
    summary = json.loads((run_dir() / "summary.json").read_text())
    assert summary["loss_spikes"] == {"number": 0}
    assert "Spikes" not in capsys.readouterr().out
    spikes = {"number": 2, "step": 21, "loss": 9.0, "usual": 0.71}
    text = format_summary({**summary, "loss_spikes": spikes, "skipped_steps": 3})
    assert "Spikes     2 steps with a loss far above the usual, the largest 9 at step 21, usual 0.71" in text
    assert "Skipped    3 steps without a finite loss" in text


def test_an_outlier_is_clipped_to_a_multiple_of_the_median():
    history = ProjectedGradHistory()
    for slope in [1.0, -2.0, 3.0] * 4:
        usual = estimate(0.7, slope)
        history.clip(usual, factor=5)
        assert float(usual.gradient["w"]) == slope
    far = estimate(0.7, -100.0)
    history.clip(far, factor=5)
    assert float(far.gradient["w"]) == pytest.approx(-10)
    lost = estimate(float("nan"), 1.0)
    history.clip(lost, factor=5)
    assert len(history.sizes) == 13


@pytest.mark.parametrize("stop", [5, pytest.param(14, marks=pytest.mark.slow)])
def test_clipping_goes_on_over_a_resume(options, stop):
    options = [*options, "--model.clip_projected_grad=1", "--trainer.max_steps=16"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, f"--trainer.max_steps={stop}"]) == 0
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    whole, resumed = (tuned(run_dir(i) / "checkpoints" / "last.ckpt") for i in (0, 2))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main(["fit", *options, "--model.clip_projected_grad=null"]) == 0
    free = tuned(run_dir(3) / "checkpoints" / "last.ckpt")
    assert not all(torch.equal(whole[name], free[name]) for name in whole)
