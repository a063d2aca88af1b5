"""The default rule: the outlier-removing layer, or a race where it is unclear or its first step promises little."""

import json

import pytest
from helpers import SMOLLM2_LAYERS, FakeTrials, choose, error_line, layer_statistics, run_dir, summary

from slzo.__main__ import main
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.experiments.layer_trials import LayerTrials
from slzo.utils.errors import SlzoError
from slzo.zo.auto_step import AutoStep
from slzo.zo.selection import Auto, Choice, Margin, OutlierRemovingLayer, auto

LAYERS = layer_statistics(*SMOLLM2_LAYERS)
GAINS = {11: 0.1, 28: 0.2, 29: 0.3}
STRAIGHT = AutoStep(eps=1e-3, loss=1.0, square=25.0)  # the first step should lower the loss by 4.5%
CURVED = AutoStep(eps=1e-3, loss=1.0, square=25.0, curvature=7500.0)  # by 25 x 0.3 / 7500 = 0.1%
REMOVING = choose(OutlierRemovingLayer(), LAYERS)


def test_a_promising_layer_is_taken_after_one_measurement():
    trials = FakeTrials(GAINS, measured=STRAIGHT)
    assert choose(Auto(), LAYERS, trials) == REMOVING
    assert (trials.looks, trials.trained) == ([28], [])


def test_where_the_first_step_promises_little_a_race_decides(capsys):
    choice = choose(Auto(), LAYERS, FakeTrials(GAINS, measured=CURVED))
    assert (choice.layer, sorted(choice.trials)) == (29, [11, 28, 29])
    why = "its first step should lower the loss by 0.10%, less than 1%"
    assert choice.note == f"OutlierRemovingLayer chose layer 28: {why}."
    assert f"{why}. A race will decide; --model.layer 28 skips it." in capsys.readouterr().out


@pytest.mark.parametrize("measures_rate", [True, False])
def test_where_the_statistics_are_unclear_a_race_decides_without_a_measurement(monkeypatch, measures_rate):
    margin = Margin(1.5, "layer 28's fall is near layer 29's")
    monkeypatch.setattr(OutlierRemovingLayer, "select", lambda self, context: Choice(28, "tested", margin=margin))
    trials = FakeTrials(GAINS, measured=STRAIGHT, measures_rate=measures_rate)
    choice = choose(Auto(), LAYERS, trials)
    assert (choice.layer, trials.looks) == (29, [])
    assert "not clear, layer 28's fall is near layer 29's" in choice.note


@pytest.mark.parametrize(
    ("changes", "looks"),
    [
        ({"measures_rate": False}, 0),  # a given rate, or half precision
        ({"generates": True}, 0),
        ({"num_dev": 0}, 0),
        ({"steps": 20}, 0),  # no room for a race
        ({"measured": AutoStep(eps=1e-3, loss=1.0, square=1e-4, largest=1e-3)}, 1),  # LoRA
    ],
    ids=str,
)
def test_elsewhere_the_statistics_decide(changes, looks):
    trials = FakeTrials(GAINS, **{"measured": CURVED} | changes)
    assert choose(Auto(), LAYERS, trials) == REMOVING
    assert (len(trials.looks), trials.trained) == (looks, [])


def test_without_trials_and_with_one_candidate_the_statistics_decide(monkeypatch):
    assert choose(Auto(), LAYERS) == REMOVING
    only = Choice(2, "as the others")
    monkeypatch.setattr(OutlierRemovingLayer, "select", lambda self, context: only)
    trials = FakeTrials({}, measured=CURVED)
    assert choose(Auto(), layer_statistics((1, 1), (1, 1), (90000, 2000)), trials) == only
    assert trials.looks == []


def test_an_error_while_measuring_is_left_to_the_training(monkeypatch):
    def fails(layer):
        raise SlzoError("the loss is nan before training")

    trials = FakeTrials(GAINS)
    monkeypatch.setattr(trials, "step_size", fails)
    assert choose(Auto(), LAYERS, trials) == REMOVING


def test_a_race_without_a_winner_keeps_the_layer_and_says_both():
    choice = choose(Auto(), LAYERS, FakeTrials(dict.fromkeys(GAINS, -0.1), measured=CURVED))
    assert choice.layer == 28
    assert "less than 1%. OutlierRemovingLayer decided: no layer lowered" in choice.note


def test_a_clear_choice_without_a_measured_rate_plans_no_race():
    def planned_steps(layer, share=0.0):
        raise AssertionError

    trials = FakeTrials(GAINS, planned_steps=planned_steps, measures_rate=False)
    assert choose(Auto(), LAYERS, trials) == REMOVING


def test_it_is_the_default():
    assert isinstance(OutlierProfiler().options.rule, Auto)


# ---- from the command line -------------------------------------------------------------------------------------------------

STEPS = ["--trainer.max_steps=20", "--model.optimizer.lr=auto"]
IN_DOUBT = [*STEPS, "--profiler.rule.share=5"]


def test_a_bad_option_is_one_line(options, capsys):
    error = error_line(capsys, "fit", *options, "--profiler.rule=Auto", "--profiler.rule.share=0")
    assert "profiler.rule.share 0" in error


@pytest.fixture
def in_doubt(options, monkeypatch):
    """Options of a run in which the default rule lets a race decide: no first step promises enough."""
    monkeypatch.setattr(auto, "_MIN_GAIN", 100.0)
    return [*(option for option in options if not option.startswith("--profiler.rule")), *IN_DOUBT]


@pytest.mark.slow
def test_a_fit_in_doubt_tunes_the_winner_of_a_race(in_doubt, capsys):
    assert main(["fit", *in_doubt]) == 0
    winner = json.loads((run_dir() / "race.json").read_text())["layer"]
    assert json.loads((run_dir() / "outlier_profile.json").read_text())["dominant_layer"] == winner
    assert summary()["dominant_layer"] == winner
    assert "A race will decide" in capsys.readouterr().out


@pytest.mark.slow
def test_a_measurement_leaves_the_training_as_it_is(in_doubt, options, monkeypatch):
    """A training after it is the one that model.layer gives."""
    looks, step_size = [], LayerTrials.step_size
    monkeypatch.setattr(OutlierRemovingLayer, "select", lambda self, context: Choice(1, "tested"))
    monkeypatch.setattr(LayerTrials, "step_size", lambda self, layer: looks.append(layer) or step_size(self, layer))
    monkeypatch.setattr(auto, "_MIN_GAIN", 1e-9)
    assert main(["fit", *in_doubt]) == 0
    assert looks == [1]
    assert main(["fit", *options, *STEPS, "--model.layer=1"]) == 0
    one, other = (json.loads((run_dir(n) / "history.json").read_text())["points"] for n in (0, 1))
    assert [point["loss"] for point in one] == [point["loss"] for point in other]


def test_a_scope_without_a_layer_and_a_sweep_race_nobody(in_doubt, capsys, tmp_path):
    """A sweep trains the layers itself."""
    assert main(["profile", *in_doubt, "--model.scope=AllParameters"]) == 0
    more = ["--layers=[0]", "--steps=2", "--directions=20", f"--output={tmp_path / 'sweep'}"]
    assert main(["sweep", *in_doubt, *more]) == 0
    assert "A race will decide" not in capsys.readouterr().out
