"""A race between layers: what it plans and costs, which layer wins, and what it leaves to the training."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
from helpers import SMOLLM2_LAYERS, FakeTrials, choose, error_line, layer_statistics, run_dir, summary

from slzo import fit
from slzo.__main__ import main
from slzo.lightning.trainer_state import planned_steps
from slzo.task_data import TaskData
from slzo.utils.errors import SlzoError
from slzo.zo.processes import SINGLE_PROCESS, Processes
from slzo.zo.selection import Race
from slzo.zo.selection.race import plan_race
from slzo.zo.trial import Score, StepCost, Trial

COST = StepCost(30, batch_size=16, evaluations=2, measuring=25, dev_rows=96)
LAYERS = layer_statistics(*SMOLLM2_LAYERS)
CANDIDATES = (11, 15, 27, 28, 29)


def plan(candidates=CANDIDATES, share=0.25, cost=COST, reference=28, total_steps=3200, num_train=1000):
    return plan_race(candidates, share, cost, reference, total_steps, num_train)


# ---- the plan --------------------------------------------------------------------------------------------------------------


def test_candidates_are_the_choices_of_the_rules_neighbours_the_last_and_the_middle_layer():
    assert Race().candidates(LAYERS) == CANDIDATES
    assert Race(layers=[5, 3, 5]).candidates(LAYERS) == (3, 5)


@pytest.mark.parametrize("share", [0.15, 0.25, 1.0])
def test_a_race_costs_what_it_says_and_no_more_than_its_share(share):
    found = plan(share=share)
    # by hand: rows times layers
    cost = (COST.dev_rows + 20 * COST.batch_size) * (max(found.steps) - min(found.steps))
    for layer, steps in found.steps.items():
        cost += (30 - layer + 1.5) * (32 * steps + 2 * COST.dev_rows + 25 * 16)
    whole = 3200 * 32 * (30 - 28 + 1.5) + 1000 * 28
    assert found.share == pytest.approx(cost / whole)
    assert 0.5 * share < found.share <= share or max(found.steps.values()) == 3200
    assert set(found.steps) | set(found.left_out) == set(CANDIDATES)
    assert min(found.steps.values()) >= 5
    if share < 1:
        costs = [(2 * steps + 25) * (30 - layer + 1.5) for layer, steps in found.steps.items()]
        assert max(costs) < 1.1 * min(costs)  # whole steps


def test_whole_vocabulary_logits_cost_every_layer_the_same():
    steps = plan((11, 29), cost=replace(COST, head_cost=9.0), reference=29).steps
    assert (2 * steps[29] + 25) / (2 * steps[11] + 25) == pytest.approx((30 - 11 + 9) / (30 - 29 + 9), rel=0.1)


def test_the_lowest_candidates_are_left_out_where_there_is_no_room():
    small = plan((0, 11, 28, 29), share=0.06)
    assert small.left_out
    assert max(small.left_out) < min(small.steps)
    assert plan((11, 28), total_steps=10).steps == {}


def test_the_layer_that_the_cost_is_compared_with_stays_in():
    found = plan((5, 20, 29), reference=5, total_steps=250)
    assert (set(found.steps), found.left_out) == ({5, 29}, (20,))
    assert plan((5, 28, 29), share=0.01, reference=5, total_steps=250).steps == {}
    trials = FakeTrials({})
    assert Race().plan(LAYERS, trials).reference == 28  # tuned without a race
    assert Race(layers=[5, 3]).plan(LAYERS, trials).reference == 3


def test_a_step_size_that_is_known_leaves_more_steps_for_all():
    plain, known = (plan((28, 29), cost=replace(COST, measured=frozenset(m))) for m in ((), (11, 28)))
    more = sum((known.steps[layer] - plain.steps[layer]) * 32 * (30 - layer + 1.5) for layer in (28, 29))
    assert more == pytest.approx(25 * 16 * (30 - 28 + 1.5), abs=2 * 32 * 3.5)  # whole steps
    assert known.share == pytest.approx(plain.share, rel=0.005)


@pytest.mark.parametrize(("cost", "lost"), [({}, 1), ({"caches": False}, 0)])
def test_states_that_are_not_kept_are_counted(cost, lost):
    found = plan((28, 29), share=2.0, cost=replace(COST, **cost), total_steps=320, num_train=200)
    depth = {layer: 31.5 if lost == 0 else 31.5 - layer for layer in found.steps}
    costs = sum(depth[layer] * (32 * steps + 25 * 16 + 2 * 96) for layer, steps in found.steps.items())
    whole = 320 * 32 * depth[28] + (0 if lost == 0 else 200 * 28)
    assert found.share == pytest.approx((costs + (96 + 200) * lost) / whole)


def test_the_states_of_few_training_rows_are_computed_once():
    assert COST.training(28, 3200, num_train=100) == COST.training(28, 3200, num_train=1000) - 900 * 28
    assert COST.training(28, 10, num_train=1000) == 10 * COST.step(28) + 160 * 28  # 10 steps see 160 rows


# ---- the race --------------------------------------------------------------------------------------------------------------


def test_the_lowest_dev_loss_wins_and_poor_trials_end_early(capsys):
    trials = FakeTrials({11: 0.6, 15: 0.03, 27: 0.03, 28: 0.15, 29: 0.003})
    choice = choose(Race(share=1.0), LAYERS, trials)
    assert (choice.layer, choice.states) == (11, "states that enter layer 11")
    ended = {layer: done < steps for layer, done, steps in trials.trained}
    assert ended == {11: False, 15: True, 27: False, 28: False, 29: True}  # a median counts itself
    printed = capsys.readouterr().out
    assert "costs about" in printed
    assert "worse than the median: stopped" in printed


def test_without_any_gain_the_outlier_removing_layer_is_chosen():
    trials = FakeTrials(dict.fromkeys(CANDIDATES, -0.1))
    choice = choose(Race(share=1.0), LAYERS, trials)
    assert choice.layer == 28
    assert "no layer lowered the dev loss" in choice.note
    assert set(choice.trials) == set(CANDIDATES)


def test_without_room_the_outlier_removing_layer_is_chosen():
    choice = choose(Race(), LAYERS, FakeTrials({}, steps=20))
    assert (choice.layer, choice.trials) == (28, {})
    assert "20 steps leave no room for a race" in choice.note


class Failing(FakeTrials):
    """Layer 27 cannot be trained, the dev loss of layer 28 is not finite."""

    def train(self, layer, steps, *, checks, **options):
        if layer == 27:
            raise SlzoError("the loss is inf before training")
        if layer == 28:
            score = Score(1, 2, 0.0, math.nan, 0.5)
            assert not checks[max(1, steps // 3)](score)
            return Trial((Score(0, 0, 0.0, 1.0, 0.5), score), (), 1.0, "the dev loss is not finite"), None
        return super().train(layer, steps, checks=checks, **options)


def test_a_candidate_that_cannot_be_trained_does_not_end_the_race(capsys):
    trials = Failing(dict.fromkeys(CANDIDATES, 0.1))
    choice = choose(Race(share=1.0), LAYERS, trials)
    assert choice.layer == 11
    assert sorted(choice.trials) == [11, 15, 28, 29]
    assert [done == steps for layer, done, steps in trials.trained if layer == 29] == [True]
    assert "layer  27: left out of the race, the loss is inf before training" in capsys.readouterr().out


def test_where_no_candidate_can_be_trained_the_outlier_removing_layer_is_chosen(monkeypatch):
    def fails(*args, **options):
        raise SlzoError("the loss is nan before training")

    trials = FakeTrials({})
    monkeypatch.setattr(trials, "train", fails)
    choice = choose(Race(share=1.0), LAYERS, trials)
    assert (choice.layer, choice.trials) == (28, {})


def test_a_race_needs_trials_and_dev_rows():
    with pytest.raises(SlzoError, match="needs short trainings, and none are possible here"):
        choose(Race(), LAYERS)
    with pytest.raises(SlzoError, match=r"set data\.num_dev"):
        choose(Race(), LAYERS, FakeTrials({}, num_dev=0))


# ---- from the command line -------------------------------------------------------------------------------------------------

STEPS = ["--trainer.max_steps=20", "--model.optimizer.lr=auto"]
RACE = [*STEPS, "--profiler.rule=Race", "--profiler.rule.share=3"]


def race_of(number):
    """The dev losses of each layer, and the chosen layer."""
    saved = json.loads((run_dir(number) / "race.json").read_text())
    return {
        int(layer): [score["loss"] for score in trial["scores"]] for layer, trial in saved["trials"].items()
    }, saved["layer"]


def test_a_fit_tunes_the_winner_and_a_race_is_the_same_twice(options):
    assert main(["fit", *options, *RACE]) == 0
    losses, winner = race_of(0)
    assert len(losses) >= 3
    assert losses[winner][-1] == min(own[-1] for own in losses.values())
    assert json.loads((run_dir() / "outlier_profile.json").read_text())["dominant_layer"] == winner
    assert summary()["dominant_layer"] == winner
    assert (run_dir() / "race.png").is_file()
    assert main(["profile", *options, *RACE]) == 0
    assert race_of(1) == (losses, winner)


@pytest.mark.slow
def test_a_training_after_a_race_is_that_without_and_takes_over_its_states(options, monkeypatch):
    taken, tune = [], fit.tune

    def counted(*args):
        model = tune(*args)
        taken.append(model.forward.cache.num_bytes)
        return model

    monkeypatch.setattr(fit, "tune", counted)
    assert main(["fit", *options, *RACE]) == 0
    assert taken[0] > 0
    del taken[:]
    assert main(["fit", *options, *STEPS, f"--model.layer={race_of(0)[1]}"]) == 0
    assert taken == [0]
    one, other = (json.loads((run_dir(n) / "history.json").read_text())["points"] for n in (0, 1))
    assert [point["loss"] for point in one] == [point["loss"] for point in other]


@pytest.mark.parametrize(
    ("wrong", "expected"),
    [
        (["--profiler.rule.share=0"], "profiler.rule.share 0"),
        (["--profiler.rule.layers=[2]"], "give at least two"),
        (["--profiler.rule.layers=[1,9]"], "profiler.rule.layers 9"),
        (["--data.num_dev=0"], "set data.num_dev"),
    ],
)
def test_wrong_options_are_one_line(options, capsys, wrong, expected):
    assert expected in error_line(capsys, "fit", *options, *RACE, *wrong)


def test_a_scope_without_a_layer_has_no_race(options, capsys):
    assert "has no dominant layer" in error_line(capsys, "profile", *options, *RACE, "--model.scope=AllParameters")


def planned_rows(processes=SINGLE_PROCESS):
    """200 training rows, 16 per batch."""
    rows = type("Rows", (TaskData,), {"processes": processes})("sst2", batch_size=16)
    rows._rows["train"] = [SimpleNamespace(encoded=SimpleNamespace(num_tokens=1 + number % 7)) for number in range(200)]
    return rows


@pytest.mark.parametrize(
    ("limits", "steps"),
    [
        ({"max_steps": 7}, 7),
        ({"max_steps": 100, "max_epochs": 2}, 26),
        ({"max_steps": 7, "max_epochs": 2}, 7),
        ({"max_epochs": 3, "limit_train_batches": 4}, 12),
        ({"max_epochs": 3, "limit_train_batches": 0.5}, 18),
        ({}, 13),
    ],
)
def test_the_training_is_as_long_as_its_first_limit(limits, steps):
    trainer = SimpleNamespace(**{"max_steps": -1, "max_epochs": -1, "limit_train_batches": 1.0} | limits)
    assert planned_steps(trainer, planned_rows()) == steps


@pytest.mark.parametrize(
    ("processes", "steps"), [(Processes(2), 7), (Processes(3), 5), (Processes(8, directions=8), 13)]
)
def test_an_epoch_of_several_processes_is_shorter(processes, steps):
    trainer = SimpleNamespace(max_steps=-1, max_epochs=1, limit_train_batches=1.0)
    assert planned_steps(trainer, planned_rows(processes)) == steps
