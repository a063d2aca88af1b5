"""A race between layers: what it plans and costs, who wins, and what it leaves behind."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from conftest import run_dir
from test_cli import bad
from test_profile import statistics

from slzo.__main__ import main
from slzo.callbacks.outlier_profiler import OutlierProfiler, _steps
from slzo.cli import build
from slzo.utils.errors import SlzoError
from slzo.experiments.race import Costs, plan_of, plan_race, race
from slzo.experiments.trial import Score, Trial
from slzo.models.engine import Engine
from slzo.models.prefix_cache import PrefixCache
from slzo.run_trainer import run_trainer
from slzo.zo.scopes import AllParameters, LayerScope
from slzo.zo.selection import LargestFall, Race

COSTS = Costs(30, batch_size=16, evaluations=2, measuring=25, total_steps=3200, train_rows=1000, dev_rows=96)
# as in SmolLM2-135M: the outlier comes in layer 11 and goes in layer 28
MAGNITUDES = [(40, 59), *[(770, 700)] * 9, (112, 62), *[(25000, 13000)] * 17, (10000, 890), (4400, 300)]


def test_entrants_are_what_the_rules_name_their_neighbours_the_last_and_the_middle():
    assert Race().entrants(statistics(*MAGNITUDES)) == (11, 15, 27, 28, 29)
    assert Race(layers=[5, 3, 5]).entrants(statistics(*MAGNITUDES)) == (3, 5)


def cost(plan, costs):
    """By hand: rows times layers."""
    rows = costs.evaluations * costs.batch_size
    total = (costs.dev_rows + 20 * costs.batch_size) * (max(plan.steps) - min(plan.steps))
    for layer, steps in plan.steps.items():
        depth = costs.num_layers - layer + 1.5
        total += depth * (steps * rows + 2 * costs.dev_rows + costs.measuring * costs.batch_size)
    return total


@pytest.mark.parametrize("equal", ["work", "steps"])
@pytest.mark.parametrize("share", [0.15, 0.25, 1.0])
def test_a_race_costs_what_it_says_and_no_more_than_its_share(share, equal):
    entrants = (11, 15, 27, 28, 29)
    plan = plan_race(entrants, share, equal, COSTS, 28)
    whole = COSTS.total_steps * COSTS.evaluations * COSTS.batch_size * (30 - 28 + 1.5) + 1000 * 28
    assert plan.share == pytest.approx(cost(plan, COSTS) / whole)
    assert 0.5 * share < plan.share <= share or max(plan.steps.values()) == COSTS.total_steps
    assert set(plan.steps) | set(plan.left_out) == set(entrants)
    assert min(plan.steps.values()) >= 5
    if equal == "steps":
        assert len(set(plan.steps.values())) == 1
    elif share < 1:
        work = [(2 * steps + 25) * (30 - layer + 1.5) for layer, steps in plan.steps.items()]
        assert max(work) < 1.1 * min(work)  # whole steps


def test_whole_vocabulary_logits_cost_every_layer_the_same():
    costs = replace(COSTS, beside_layers=9.0)
    steps = plan_race((11, 29), 0.25, "work", costs, 29).steps
    assert (2 * steps[29] + 25) / (2 * steps[11] + 25) == pytest.approx((30 - 11 + 9) / (30 - 29 + 9), rel=0.1)


def test_entrants_are_left_out_from_below_where_there_is_no_room():
    small = plan_race((0, 11, 28, 29), 0.06, "work", COSTS, 28)
    assert small.left_out
    assert max(small.left_out) < min(small.steps)
    assert plan_race((11, 28), 0.25, "work", replace(COSTS, total_steps=10), 28).steps == {}


def test_the_cost_is_held_against_the_layer_that_would_be_tuned_without_a_race():
    assert Race().reference(statistics(*MAGNITUDES)) == 28
    assert Race(layers=[5, 3]).reference(statistics(*MAGNITUDES)) == 3
    assert set(plan_race((11, 28, 29), 0.25, "work", COSTS, 11).steps) == {11, 28, 29}
    quickstart = replace(COSTS, total_steps=320)
    assert set(plan_race((11, 28, 29), 0.25, "work", quickstart, 28).steps) == {28, 29}


def test_a_step_that_was_measured_before_leaves_more_for_all():
    plain = plan_race((28, 29), 0.25, "work", COSTS, 28)
    known = plan_race((28, 29), 0.25, "work", replace(COSTS, measured=frozenset({11, 28})), 28)
    spared = 25 * 16 * (30 - 28 + 1.5)
    work = sum(
        (known.steps[layer] - plain.steps[layer]) * 2 * COSTS.batch_size * (30 - layer + 1.5) for layer in (28, 29)
    )
    assert work == pytest.approx(spared, abs=2 * 2 * COSTS.batch_size * 3.5)  # whole steps
    assert known.share == pytest.approx(plain.share, rel=0.005)
    bench = FakeBench({})
    bench.known = {11, 28}
    found = plan_of(bench, Race(layers=[28, 29]), statistics(*MAGNITUDES), 3200)
    assert found.steps == plan_race((28, 29), 0.25, "work", replace(COSTS, train_rows=200, measured={28}), 28).steps


def test_the_layer_it_is_held_against_stays_in():
    small = replace(COSTS, total_steps=250)
    plan = plan_race((5, 20, 29), 0.25, "work", small, 5)
    assert (set(plan.steps), plan.left_out) == ({5, 29}, (20,))
    assert plan_race((5, 28, 29), 0.01, "work", small, 5).steps == {}


@pytest.mark.parametrize(("engine", "lost"), [({}, 1), ({"cache_dtype": "bfloat16"}, 29), ({"cache_gb": 0}, 0)])
def test_states_that_are_not_carried_on_or_not_kept_are_counted(engine, lost):
    bench = FakeBench({})
    bench.module.engine = Engine(**engine)
    plan = plan_of(bench, Race(share=2.0, layers=[28, 29]), statistics(*MAGNITUDES), 320)
    depth = {layer: 31.5 if lost == 0 else 31.5 - layer for layer in plan.steps}
    rows = {layer: 32 * steps + 25 * 16 + 2 * 96 for layer, steps in plan.steps.items()}
    cost = sum(depth[layer] * rows[layer] for layer in plan.steps) + (96 + 200) * lost
    whole = 320 * 32 * depth[28] + (0 if lost == 0 else 200 * 28)
    assert plan.share == pytest.approx(cost / whole)


def test_few_training_rows_cost_their_states_once():
    few = replace(COSTS, train_rows=100)
    assert few.training(28) == COSTS.training(28) - 900 * 28
    assert few.beside((28, 29)) == COSTS.beside((28, 29)) - 220


class FakeBench:
    """Layers whose dev loss falls by so much a step."""

    def __init__(self, gains):
        self.gains, self.before, self.asked, self.prefix = gains, None, [], None
        choice = SimpleNamespace(automatic=True)
        self.module = SimpleNamespace(
            optimizer_choice=choice,
            step_options=SimpleNamespace(eps=None, num_queries=1),
            noise_seed=0,
            scope=LayerScope(),
            engine=Engine(),
            parts=SimpleNamespace(model=SimpleNamespace(dtype=torch.float32)),
        )
        self.datamodule = SimpleNamespace(batch_size=16, rows=lambda split: range(200))

    def head_layers(self):
        return 0.0

    known = frozenset()

    def knows_step(self, layer):
        return layer in self.known

    def move_prefix(self, layer):
        pass

    def forget_prefix(self):
        pass

    def trial(self, layer, *, steps, seed, num_batches, checks):
        self.prefix = f"states that enter layer {layer}"
        self.before = Score(0, 0, 0.0, 1.0, 0.5)
        scores = [self.before]
        for step in [*checks, steps]:
            scores.append(Score(step, 2 * step, 0.0, 1.0 - self.gains[layer] * step, 0.5))
            if step in checks and not checks[step](scores[-1]):
                break
        self.asked.append((layer, scores[-1].step, steps))
        return Trial(tuple(scores), (), 1.0, "")


def test_the_lowest_dev_loss_wins_and_the_worse_half_ends_early(capsys):
    gains = {11: 0.02, 15: 0.001, 27: 0.001, 28: 0.005, 29: 0.0001}
    bench = FakeBench(gains)
    found = race(bench, Race(share=1.0, equal="steps"), statistics(*MAGNITUDES), 320)
    assert (found.choice.layer, found.states) == (11, "states that enter layer 11")
    ended = {layer: done < steps for layer, done, steps in bench.asked}
    assert ended == {11: False, 15: True, 27: False, 28: False, 29: True}  # a median counts itself
    printed = capsys.readouterr().out
    assert "costs about" in printed
    assert "in the worse half so far" in printed
    found = race(FakeBench(gains), Race(equal="work"), statistics(*MAGNITUDES), 3200)
    assert found.choice.layer == 28  # more steps for the same work


def test_where_nobody_gains_largest_fall_decides_and_says_so():
    bench = FakeBench(dict.fromkeys((11, 15, 27, 28, 29), -0.001))
    choice = race(bench, Race(share=1.0), statistics(*MAGNITUDES), 320).choice
    assert choice.layer == LargestFall().select(statistics(*MAGNITUDES)).layer
    assert "no layer lowered the dev loss" in choice.note


class Failing(FakeBench):
    """One layer's step cannot be measured, another's dev loss is not finite."""

    def trial(self, layer, *, steps, checks, **options):
        if layer == 27:
            raise SlzoError("the loss is inf before training")
        if layer == 28:
            self.before = Score(0, 0, 0.0, 1.0, 0.5)
            score = Score(1, 2, 0.0, math.nan, 0.5)
            assert not checks[max(1, steps // 3)](score)
            return Trial((self.before, score), (), 1.0, "the dev loss is not finite")
        return super().trial(layer, steps=steps, checks=checks, **options)


def test_an_entrant_that_cannot_run_does_not_end_the_race(capsys):
    gains = dict.fromkeys((11, 15, 29), 0.001)
    bench = Failing(gains)
    found = race(bench, Race(share=1.0, equal="steps"), statistics(*MAGNITUDES), 320)
    assert found.choice.layer == 11
    assert sorted(found.trials) == [11, 15, 28, 29]
    assert [done == steps for layer, done, steps in bench.asked if layer == 29] == [True]
    assert "layer  27: out of the race, the loss is inf before training" in capsys.readouterr().out


def test_where_nobody_can_run_largest_fall_decides():
    class NoneRuns(FakeBench):
        def trial(self, layer, **options):
            raise SlzoError("the loss is nan before training")

    found = race(NoneRuns({}), Race(share=1.0), statistics(*MAGNITUDES), 320)
    assert (found.choice.layer, found.trials) == (28, {})


RACE = [
    "--trainer.max_steps=20",
    "--profiler.rule=Race",
    "--profiler.rule.share=3",
    "--profiler.rule.dev_rows=16",
    "--model.optimizer.lr=auto",
]


def test_a_fit_with_a_race_tunes_the_winner(options, capsys):
    assert main(["fit", *options, *RACE]) == 0
    saved = json.loads((run_dir() / "race.json").read_text())
    losses = {int(layer): trial["scores"][-1]["loss"] for layer, trial in saved["trials"].items()}
    assert len(losses) >= 3
    assert losses[saved["layer"]] == min(losses.values())
    profile = json.loads((run_dir() / "outlier_profile.json").read_text())
    assert profile["dominant_layer"] == saved["layer"]
    assert json.loads((run_dir() / "summary.json").read_text())["dominant_layer"] == saved["layer"]
    assert (run_dir() / "race.png").is_file()
    assert "after equal work" in capsys.readouterr().out


def test_a_race_leaves_the_training_as_it_is_and_its_states(options, monkeypatch):
    """A training after a race is the one that model.layer gives; it does not compute again what the race had."""
    taken, take_over = [], PrefixCache.take_over

    def counted(self, other):
        before = self.num_bytes
        take_over(self, other)
        taken.append(self.num_bytes - before)

    monkeypatch.setattr(PrefixCache, "take_over", counted)
    assert main(["fit", *options, *RACE]) == 0
    assert len(taken) == 1
    assert taken[0] > 0
    layer = json.loads((run_dir() / "race.json").read_text())["layer"]
    assert main(["fit", *options, "--trainer.max_steps=20", "--model.optimizer.lr=auto", f"--model.layer={layer}"]) == 0
    one, other = (json.loads((run_dir(n) / "history.json").read_text())["points"] for n in (0, 1))
    assert [point["loss"] for point in one] == [point["loss"] for point in other]


def test_a_race_is_the_same_twice(options):
    for _ in range(2):
        assert main(["profile", *options, *RACE]) == 0
    one, other = (json.loads((run_dir(n) / "race.json").read_text()) for n in (0, 1))
    losses = [{k: [s["loss"] for s in trial["scores"]] for k, trial in each["trials"].items()} for each in (one, other)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        (["--profiler.rule.share=0"], "profiler.rule.share 0"),
        (["--profiler.rule.layers=[2]"], "give at least two"),
        (["--profiler.rule.layers=[1,9]"], "profiler.rule.layers 9"),
        (["--profiler.rule.dev_rows=3"], "profiler.rule.dev_rows 3"),
    ],
)
def test_wrong_options_are_one_line(options, capsys, wrong, told):
    assert told in bad(capsys, "fit", *options, "--profiler.rule=Race", *wrong)


def test_a_scope_without_a_layer_has_no_race():
    bench = FakeBench({})
    bench.module.scope = AllParameters()
    with pytest.raises(SlzoError, match="has none; choose another rule"):
        race(bench, Race(), statistics(*MAGNITUDES), 320)


def test_a_race_without_dev_rows_is_one_line(options, capsys):
    assert "set data.num_dev" in bad(capsys, "fit", *options, *RACE, "--data.num_dev=0")


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
    rows = SimpleNamespace(rows=lambda split: range(200), batch_size=16)
    trainer = SimpleNamespace(**{"max_steps": -1, "max_epochs": -1, "limit_train_batches": 1.0} | limits)
    assert _steps(trainer, SimpleNamespace(datamodule=rows)) == steps


def test_a_race_of_a_profile_leaves_nothing_to_a_later_fit(options, monkeypatch, tmp_path):
    """Another data module's rows have the same keys."""
    taken = []
    monkeypatch.setattr(PrefixCache, "take_over", lambda self, other: taken.append(other))
    cli = build([*options, *RACE], run=False)
    profiler = OutlierProfiler(Race(share=3, dev_rows=16))
    trainer = run_trainer(profiler, accelerator="cpu", default_root_dir=tmp_path, max_steps=2, val_check_interval=2)
    trainer.profile(cli.model, cli.datamodule)
    cli.model.layer = 1
    trainer.fit(cli.model, cli.datamodule)
    assert profiler.profile.dominant_layer == 1
    assert profiler._race is None
    assert taken == []


def test_statistics_alone_choose_nothing():
    with pytest.raises(SlzoError, match="slzo fit or profile"):
        Race().select(statistics(*MAGNITUDES))
