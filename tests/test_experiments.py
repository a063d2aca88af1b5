"""The layer sweep and the search for a learning rate, in process on a tiny model."""

import csv
import json
import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import run_dir

from slzo.__main__ import main
from slzo.batches.losses import candidate_scores
from slzo.cli import build
from slzo.data.batch import EvalCollator
from slzo.utils.errors import SlzoError
from slzo.experiments import sweep
from slzo.experiments.lr_search import Tried, make_grid, recommend
from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import plan_sweep
from slzo.experiments.sweep_report import LayerResult, curves_verdict, layer_curves, seed_curves, verdict
from slzo.experiments.trial import Score, Trial, Workbench, _some
from slzo.zo.estimators import Point
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection import FirstOutlierLayer

SWEEP = ["--steps=3", "--output=swept", "--directions=20", "--num_rows=8"]


def sweep_csv(folder="swept"):
    with (Path(folder) / "sweep.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


def bench_of(options, *more):
    cli = build([*options, "--trainer.logger=false", *more], run=False)
    cli.trainer.attach(cli.model, cli.datamodule)
    return Workbench(cli.model, cli.datamodule)


def test_some_dev_rows_are_spread_over_the_batches():
    batches = [SimpleNamespace(rows=range(32), place=place) for place in range(7)]
    assert [batch.place for batch in _some(batches, 96)] == [1, 3, 5]
    assert [batch.place for batch in _some(batches, 32)] == [3]
    assert _some(batches, 1000) == batches
    assert _some([], 96) == []


def test_a_step_that_was_looked_at_is_not_measured_again(options):
    auto = ["--model.optimizer.lr=auto", "--model.eps=auto"]
    plain, looked = bench_of(options, *auto), bench_of(options, *auto)
    step = looked.measured_step(1)
    assert looked.knows_step(1)
    assert not looked.knows_step(2)
    expected, found = (bench.trial(1, steps=3, seed=0) for bench in (plain, looked))
    assert found.losses == expected.losses
    assert found.scores[-1].loss == expected.scores[-1].loss
    assert found.scores[-1].evaluations == expected.scores[-1].evaluations - step.evaluations
    assert looked.trial(1, steps=3, seed=0).losses == expected.losses  # it is as it was
    assert looked.trial(1, steps=3, seed=1).losses == plain.trial(1, steps=3, seed=1).losses


@pytest.mark.pictures
def test_sweep_writes_table_json_figure_and_a_verdict(options, capsys):
    assert main(["sweep", *options, *SWEEP, "--layers=[3,1]", "--seeds=[0,1]"]) == 0
    output = capsys.readouterr().out
    rows = sweep_csv()
    assert [row["layer"] for row in rows] == ["0", "1", "2", "3"]
    assert list(rows[0])[:4] == ["layer", "sensitivity", "sensitivity_se", "outlier_ratio"]
    assert all(float(row["sensitivity"]) > 0 and float(row["sensitivity_se"]) > 0 for row in rows)
    assert [row["seeds"] for row in rows] == ["0", "2", "0", "2"]
    assert [bool(row["loss"]) for row in rows] == [False, True, False, True]
    assert sum(row["dominant"] == "True" for row in rows) == 1
    content = json.loads(Path("swept/sweep.json").read_text())
    assert content["verdict"] in output
    assert content["plan"]["layers"] == [1, 3]
    assert Path("swept/sweep.png").stat().st_size > 10_000
    assert "<svg" in Path("swept/sweep.svg").read_text(encoding="utf-8")
    assert "cells left" in output
    assert not Path("runs").exists()


def test_a_sweep_goes_on_where_it_stopped_and_repeats_nothing(options, capsys, monkeypatch):
    calls = []
    original = Workbench.trial

    def trial(self, layer, **kwargs):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return original(self, layer, **kwargs)

    monkeypatch.setattr(Workbench, "trial", trial)
    assert main(["sweep", *options, *SWEEP, "--layers=[1,2,3]"]) == 130
    assert capsys.readouterr().err.endswith("slzo: interrupted; the same command goes on where it stopped\n")
    assert main(["sweep", *options, *SWEEP, "--layers=[1,2,3]"]) == 0
    assert calls == [1, 2, 2, 3]
    first = sweep_csv()
    assert main(["sweep", *options, *SWEEP, "--layers=[1,2,3]"]) == 0
    assert len(calls) == 4
    assert sweep_csv() == first


def test_sensitivity_only_trains_nothing(options, monkeypatch, capsys):
    monkeypatch.setattr(Workbench, "trial", None)
    assert main(["sweep", *options, *SWEEP, "--sensitivity_only=true"]) == 0
    assert "no layer was trained" in capsys.readouterr().out
    assert all(row["loss"] == "" for row in sweep_csv())


def test_a_sensitivity_may_be_followed_by_trainings_of_one_length(options, capsys):
    common = ["sweep", *options, "--output=swept", "--num_rows=8", "--layers=[1]"]
    assert main([*common, "--sensitivity_only=true"]) == 0
    assert main([*common, "--steps=2"]) == 0
    assert sweep_csv()[1]["loss"] != ""
    assert main([*common, "--steps=3"]) == 2
    assert "steps: 2 -> 3" in capsys.readouterr().err
    assert main([*common, "--sensitivity_only=true"]) == 0
    assert main([*common, "--steps=3"]) == 2


def test_a_sweep_of_another_task_of_the_same_name_is_refused(options, capsys):
    for name, word in (("train", "word"), ("test", "other")):
        rows = [{"text": f"{word} {n}", "label": n % 2} for n in range(24)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    task = {"candidates": [" bad", " good"], "train_file": "train.jsonl", "test_file": "test.jsonl"}
    command = ["sweep", *options, *SWEEP, "--sensitivity_only=true", "--data.data_dir=null"]
    for prompt, status in (("{text} is", 0), ("{text} was", 2)):
        given = json.dumps({"class_path": "slzo.tasks.template.TemplateTask", "init_args": task | {"prompt": prompt}})
        assert main([*command, f"--data.task={given}"]) == status
    assert "task.prompt: {text} is -> {text} was" in capsys.readouterr().err


def test_a_sweep_into_a_folder_of_another_kind_is_refused(options, capsys):
    CellStore("swept", {"kind": "reproduce_tables"}).save("x", {})
    for extra in ([], ["--sensitivity_only=true"]):
        assert main(["sweep", *options, *SWEEP, *extra]) == 2
        assert "holds results of other settings" in capsys.readouterr().err


def test_a_folder_without_results_takes_other_settings(tmp_path):
    CellStore(tmp_path / "s", {"eps": 1})
    store = CellStore(tmp_path / "s", {"eps": 2})
    store.save("x", {})
    with pytest.raises(SlzoError, match="eps: 2 -> 3"):
        CellStore(tmp_path / "s", {"eps": 3})


def test_a_sweep_folder_of_another_configuration_is_refused_and_kept(options, capsys):
    assert main(["sweep", *options, *SWEEP, "--sensitivity_only=true"]) == 0
    before = {path: path.read_bytes() for path in Path("swept").rglob("*") if path.is_file()}
    assert main(["sweep", *options, *SWEEP, "--sensitivity_only=true", "--model.eps=2e-3"]) == 2
    error = capsys.readouterr().err
    assert "swept" in error
    assert "eps: 0.001 -> 0.002" in error
    assert before == {path: path.read_bytes() for path in Path("swept").rglob("*") if path.is_file()}
    rademacher = ["--model.estimator=SPSA", "--model.estimator.noise=rademacher"]
    assert main(["sweep", *options, *SWEEP, "--sensitivity_only=true", *rademacher]) == 2
    assert "estimator.noise: gaussian -> rademacher" in capsys.readouterr().err
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    assert main(["sweep", *options, "--output=mine"]) == 2
    assert "holds other files" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers=[9]"], r"layers 9: the model has 4 decoder layers.* let all be trained"),
        (["--layers=1"], r"layers '1': expected a list like \[1, 2\] or null"),
        (["--layers=[]"], r"layers \[\]: give at least one layer"),
        (["--max_error=-1"], r"max_error -1.0: give a share"),
        (["--directions=3"], r"directions 3: .*at least 20"),
        (["--steps=-1"], r"steps -1"),
        (["--seeds=[]"], r"seeds \[\]"),
        (["--model.scope=AllParameters"], r"model\.scope: a sweep goes over the dominant layer"),
    ],
)
def test_bad_sweep_options(options, capsys, extra, message):
    assert main(["sweep", *options, "--output=swept", *extra]) == 2
    error = capsys.readouterr().err
    assert re.fullmatch(rf"slzo: error: {message}.*", error.splitlines()[-1])
    assert not Path("swept").exists()


def test_a_cell_is_worked_on_once(tmp_path):
    first, second = (CellStore(tmp_path / "s", {"a": 1}) for _ in range(2))
    with first.claim("x") as mine:
        assert mine
        with second.claim("x") as too:
            assert not too
        first.save("x", {"value": 1})
    with second.claim("x") as again:
        assert not again
    assert second.result("x") == {"value": 1}


@pytest.mark.parametrize(
    "extra",
    [
        [],
        ["--model.scope=LoRA", "--model.scope.rank=4"],
        ["--model.scope=ActivationSubspace", "--model.scope.rank=4"],
        ["--data.seed=5"],
    ],
)
def test_a_trial_takes_the_steps_of_fit(options, extra):
    """The same losses as slzo fit with the same seed and layer, and the model is untuned again after it."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    bench = bench_of(options, *extra)
    before = {name: tensor.clone() for name, tensor in bench.module.model.named_parameters()}
    bench.trial(1, steps=2, seed=3)
    found = bench.trial(2, steps=8, seed=0)
    after = dict(bench.module.model.named_parameters())
    assert set(before) == set(after)
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())

    fit = [*options, *extra, "--model.layer=2", "--trainer.max_steps=8", "--trainer.val_check_interval=8"]
    assert main(["fit", *fit]) == 0
    events = EventAccumulator(str(run_dir()))
    events.Reload()
    plus, minus = ([e.value for e in events.Scalars(f"train/loss_{side}")] for side in ("plus", "minus"))
    expected = [(a + b) / 2 for a, b in zip(plus, minus, strict=True)]
    torch.testing.assert_close(torch.tensor(found.losses), torch.tensor(expected), rtol=1e-4, atol=1e-5)
    assert found.scores[-1].loss == pytest.approx(events.Scalars("val/loss")[-1].value, rel=1e-4)
    assert found.scores[-1].metric == pytest.approx(events.Scalars("val/accuracy")[-1].value)
    assert found.scores[-1].evaluations == 16


def test_a_trial_measures_what_fit_measures(options):
    """lr auto and eps auto: the same losses, rates and evaluations as slzo fit with the same seed and layer."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    given = ("--model.eps", "--model.optimizer")
    auto = [option for option in options if not option.startswith(given)]
    bench = bench_of(auto)
    before = {name: tensor.clone() for name, tensor in bench.module.model.named_parameters()}
    found = bench.trial(2, steps=6, seed=0)
    lr, eps = bench.own_step(2)
    assert all(torch.equal(tensor, before[name]) for name, tensor in bench.module.model.named_parameters())
    assert main(["fit", *auto, "--model.layer=2", "--trainer.max_steps=6", "--trainer.val_check_interval=6"]) == 0
    events = EventAccumulator(str(run_dir()))
    events.Reload()
    plus, minus, rates, sizes = (
        [event.value for event in events.Scalars(f"train/{name}")] for name in ("loss_plus", "loss_minus", "lr", "eps")
    )
    torch.testing.assert_close(
        torch.tensor(found.losses), (torch.tensor(plus) + torch.tensor(minus)) / 2, rtol=1e-4, atol=1e-5
    )
    summary = json.loads((run_dir() / "summary.json").read_text())
    assert found.scores[-1].evaluations == summary["evaluations"] > 12
    assert eps == summary["eps"] == pytest.approx(sizes[0])
    assert lr == float(f"{lr:.1g}")
    assert 0.5 < lr / rates[0] < 2


def test_given_rates_are_not_measured(options):
    bench = bench_of([option for option in options if not option.startswith("--model.eps")])
    assert bench.trial(2, steps=2, seed=0, lr=1e-3, eps=1e-3).scores[-1].evaluations == 4
    assert bench.trial(2, steps=2, seed=0).scores[-1].evaluations > 4  # eps is auto


class _Clock:
    """Seconds that pass with each look at the clock."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_a_trial_for_a_time_is_scored_on_the_way(options, monkeypatch):
    """A step takes two looks at the clock, 1 s: with 5 steps asked for it goes on until 23 s are used."""
    from slzo.experiments import trial as trials

    bench = bench_of(options)
    plain = bench.trial(2, steps=23, seed=0)
    assert [score.step for score in plain.scores] == [0, 23]
    monkeypatch.setattr(trials.time, "perf_counter", _Clock(1.0))
    found = bench.trial(2, steps=5, seed=0, seconds=22.5)
    assert [score.step for score in found.scores] == [0, 5, 10, 20, 23]
    assert [score.seconds for score in found.scores] == [0, 5, 10, 20, 23]
    assert [score.evaluations for score in found.scores] == [0, 10, 20, 40, 46]
    assert found.losses == plain.losses  # looking on the way changes nothing
    assert found.scores[-1].loss == plain.scores[-1].loss
    few = bench.trial(2, steps=12, seed=0, seconds=3)
    assert [score.step for score in few.scores] == [0, 10, 12]  # the steps come first


@pytest.mark.pictures
def test_a_sweep_for_a_time_compares_after_the_same_steps_and_the_same_time(options, capsys):
    command = ["sweep", *options, *SWEEP, "--layers=[1,3]", "--steps=3", "--seconds=0.2"]
    assert main(command) == 0
    output = capsys.readouterr().out
    content = json.loads(Path("swept/sweep.json").read_text())
    assert set(content["curves"]) == {"1", "3"}
    for curve in content["curves"].values():
        steps, seconds, losses = ([score[name] for score in curve] for name in ("step", "seconds", "loss"))
        assert steps[0] == seconds[0] == 0
        assert 3 in steps
        assert steps == sorted(set(steps))
        assert seconds == sorted(seconds)
        assert seconds[-1] >= 0.2
        assert all(math.isfinite(loss) for loss in losses)
    assert Path("swept/sweep_curves.png").stat().st_size > 10_000
    assert content["verdict"] in output
    assert re.fullmatch(
        r"After 3 steps layer [13] is ahead, at a dev loss of \d\.\d{4}.* After 0\.2 s layer [13] is ahead, .*",
        content["verdict"],
    )
    assert content["settings"]["seconds"] == 0.2


def test_a_sweep_for_a_time_and_one_for_steps_share_no_trainings(options, capsys):
    common = ["sweep", *options, "--output=swept", "--num_rows=8", "--layers=[1]", "--steps=2"]
    assert main([*common, "--sensitivity_only=true", "--seconds=1"]) == 0  # no training, no time
    assert not Path("swept/sweep_curves.png").exists()
    assert main(common) == 0
    assert main([*common, "--seconds=0.05"]) == 2
    assert "seconds: None -> 0.05" in capsys.readouterr().err
    assert main([*common, "--sensitivity_only=true"]) == 0
    timed = [*common, "--output=timed", "--seconds=0.05"]
    assert main(timed) == 0
    for other in (common, [*common, "--seconds=0.06"]):
        assert main([*other, "--output=timed"]) == 2
        assert "seconds: 0.05 -> " in capsys.readouterr().err
    assert main(timed) == 0


@pytest.mark.parametrize("seconds", ["0", "-1", ".inf"])
def test_bad_seconds(options, capsys, seconds):
    assert main(["sweep", *options, "--output=swept", f"--seconds={seconds}"]) == 2
    assert "give a number above 0, or leave it out" in capsys.readouterr().err
    assert not Path("swept").exists()


def curve(*points):
    return [Score(step, 2 * step, seconds, loss, 0.5) for step, seconds, loss in points]


def test_curves_are_means_over_seeds_at_the_same_steps(tmp_path):
    """Seeds end at other steps; those on the way are not mixed with the last ones."""
    store, plan = CellStore(tmp_path / "s", {}), plan_sweep(4, [2, 3], 20, [0, 1], 20, 8, 30.0)
    scores = {
        (2, 0): curve((0, 0, 1.0), (10, 4, 0.8), (20, 8, 0.6), (71, 30, 0.5)),
        (2, 1): curve((0, 0, 1.0), (10, 6, 0.6), (20, 12, 0.4), (40, 20, 0.3), (59, 31, 0.1)),
        (3, 0): curve((0, 0, 1.0), (10, 4, 0.9), (20, 8, 0.7)),
        (3, 1): curve((0, 0, 1.0), (10, 4, 9.0)),
    }
    for (layer, seed), own in scores.items():
        diverged = "up" if (layer, seed) == (3, 1) else ""
        store.save(f"train-{layer}-seed-{seed}", Trial(tuple(own), (1.0,), 1.0, diverged).to_dict())
    found = layer_curves(seed_curves(store, plan))
    assert [(score.step, score.evaluations) for score in found[2]] == [(0, 0), (10, 20), (20, 40), (65, 130)]
    assert [score.seconds for score in found[2]] == pytest.approx([0, 5, 10, 30.5])
    assert [score.loss for score in found[2]] == pytest.approx([1.0, 0.7, 0.5, 0.3])
    assert found[3] == scores[3, 0]


def test_the_verdict_reads_curves_where_they_were_not_scored():
    """Halfway between two scores the loss is halfway too; after the last one it stays."""
    plan = plan_sweep(4, None, 20, [0], 20, 8, 30.0)
    curves = {
        1: [curve((0, 0, 1.0), (20, 10, 0.5), (40, 20, 0.45), (80, 40, 0.35))],
        2: [curve((0, 0, 1.0), (20, 28, 0.4), (24, 32, 0.44))],
    }
    assert curves_verdict(curves, plan, 2) == (
        "After 20 steps layer 2 is ahead, at a dev loss of 0.4000 (one seed). "
        "After 30 s layer 1 is ahead, at a dev loss of 0.4000 (one seed), the chosen layer 2 at 0.4200 (one seed)."
    )
    curves[2].append(curve((0, 0, 1.0), (20, 28, 0.42), (24, 32, 0.46)))
    assert "layer 2 is ahead, at a dev loss of 0.4100 +- 0.0100." in curves_verdict(curves, plan, 2)
    assert "chosen" not in curves_verdict(curves, plan, 3)


def test_moved_prefix_states_are_those_of_the_next_layer(options):
    bench = bench_of(options)
    bench.trial(1, steps=3, seed=0)
    held = set(bench._cache._states)
    assert held
    bench.move_prefix(3)
    assert bench._cache.start == 3
    assert set(bench._cache._states) == held
    moved = bench.trial(3, steps=4, seed=0)
    fresh = bench_of(options).trial(3, steps=4, seed=0)
    torch.testing.assert_close(torch.tensor(moved.losses), torch.tensor(fresh.losses), rtol=1e-4, atol=1e-5)


def test_states_that_are_kept_rounded_are_not_rounded_again_at_the_next_layer(options):
    """Moved from layer to layer they would be; a trial after others equals one that is the first."""
    small = [*options, "--model.engine.cache_dtype=bfloat16"]
    bench = bench_of(small)
    for layer in (1, 2):
        bench.move_prefix(layer)
        bench.trial(layer, steps=3, seed=0)
    bench.move_prefix(3)
    moved = bench.trial(3, steps=4, seed=0)
    fresh = bench_of(small).trial(3, steps=4, seed=0)
    assert moved.losses == fresh.losses


def test_sensitivity_is_the_mean_slope(options):
    """Against a plain loop over the whole model, with the same directions."""
    bench = bench_of(options)
    found = bench.sensitivity(2, directions=20, seed=5, num_rows=8)
    module = bench.module
    rows = next(bench.datamodule.training_batches(8, 5))
    tuned, eps = module.tune(2).tensors, module.step_options.eps
    slopes = []
    with torch.no_grad():
        for query in range(20):
            losses = []
            for sign in (1, -1):
                tuned.write(tuned.draw(5, 0, query), sign * eps)
                scores = candidate_scores(module.parts.logits(rows.packed), rows.packed)
                total, weight = CandidateCrossEntropy().of_scores(scores, rows.packed)
                losses.append(float(total / weight))
            slopes.append(abs(losses[0] - losses[1]) / (2 * eps))
    tuned.restore()
    slopes = torch.tensor(slopes)
    assert found.mean == pytest.approx(float(slopes.mean()), rel=1e-2)
    assert found.standard_error == pytest.approx(float(slopes.std() / math.sqrt(20)), rel=2e-2)


def test_divergence_is_named(options):
    trial = bench_of(options).trial(2, steps=6, seed=0, lr=1e38)
    assert trial.diverged
    assert trial.gain == -math.inf
    assert Trial.from_dict(json.loads(json.dumps(trial.to_dict()))) == trial


def test_tune_recommends_and_goes_on(options, capsys, monkeypatch):
    command = ["lr_search", *options, "--steps=4", "--lrs=[1e-3,1e-2,1e38]", "--output=tuned"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "lr 1e+38, eps 0.001: diverged" in output
    content = json.loads(Path("tuned/lr_search.json").read_text())
    assert [pair["lr"] for pair in content["tried"]] == [1e-3, 1e-2, 1e38]
    assert content["tried"][2]["loss"] is None
    assert content["why"] in output
    calls = []
    monkeypatch.setattr(Workbench, "trial", lambda *args, **kwargs: calls.append(kwargs))
    assert main(command) == 0
    assert calls == []
    assert main([*command, "--model.num_queries=2"]) == 2
    assert "num_queries: 1 -> 2" in capsys.readouterr().err


def pair(lr, loss, eps=1e-3, diverged=""):
    return Tried(lr, eps, math.inf if diverged else loss, 0.5, diverged)


def test_recommendations():
    best, words = recommend([pair(1e-4, 0.9), pair(1e-3, 0.6), pair(1e-2, 0, diverged="up")], 1.0)
    assert best.lr == 1e-3
    assert "From lr 0.01 on training diverges" in words
    assert "of the grid" not in words
    best, words = recommend([pair(1e-4, 0.9), pair(1e-3, 0.6)], 1.0)
    assert "largest rate of the grid" in words
    best, words = recommend([pair(1e-4, 0.5), pair(1e-3, 0.6)], 1.0)
    assert "smallest rate of the grid" in words
    best, words = recommend([pair(1e-4, 0.999), pair(1e-3, 1.2)], 1.0)
    assert best is None
    assert "No rate lowered" in words
    best, words = recommend([pair(1e-4, 0, diverged="up")], 1.0)
    assert best is None
    assert "Every rate diverged" in words


def test_the_grid_spreads_around_the_configured_rate():
    grid = make_grid(None, None, 40, [0], lambda: (3e-4, 1e-3))
    assert len(grid.lrs) == 7
    assert grid.lrs[3] == pytest.approx(3e-4)
    assert grid.lrs[-1] / grid.lrs[0] == pytest.approx(1000)
    assert grid.eps == (1e-3,)
    for bad in ({"lrs": [0.0]}, {"lrs": []}, {"eps": [-1.0]}, {"steps": 0}, {"seeds": []}):
        arguments = {"lrs": [1e-3], "eps": None, "steps": 4, "seeds": [0]} | bad
        with pytest.raises(SlzoError, match=next(iter(bad))):
            make_grid(**arguments, own=lambda: (1e-3, 1e-3))


def test_the_grid_is_around_the_measured_rate_only_if_none_is_given():
    def fails():
        raise AssertionError

    assert make_grid([1e-3], [1e-2], 4, [0], fails).eps == (1e-2,)
    assert make_grid([1e-3], None, 4, [0], lambda: (1.0, 2e-2)).eps == (2e-2,)
    assert make_grid(None, [1e-2], 4, [0], lambda: (5.0, 1.0)).lrs[3] == 5.0


def row(layer, gain=None, dominant=False, sensitivity=1.0, diverged=0, se=0.01):
    loss = None if gain is None else 1 - gain
    return LayerResult(layer, sensitivity, 0.1, 10.0, 1, 1.0, loss, se, gain, 0.5, 0.1, 1.0, 1.0, diverged, dominant)


def test_verdicts():
    assert "11, wins: it lowers the dev loss by 0.4000, 0.3000 more" in verdict(
        [row(2, 0.1), row(11, 0.4, dominant=True)], "accuracy"
    )
    assert "21.2 standard errors" in verdict([row(2, 0.1), row(11, 0.4, dominant=True)], "accuracy")
    near = verdict([row(2, 0.39), row(11, 0.4, dominant=True)], "accuracy")
    assert "The chosen layer, 11, leads, but not clearly" in near
    assert "0.7 standard errors" in near
    behind = verdict([row(2, 0.41), row(11, 0.4, dominant=True)], "accuracy")
    assert "does not clearly lose: layer 2 lowers the dev loss by 0.4100, 0.0100 more, 0.7 standard errors" in behind
    alone = verdict([row(2, 0.1, se=None), row(11, 0.4, dominant=True, se=None)], "accuracy")
    assert "from one seed, so how sure is not known" in alone
    assert "does not win: layer 2" in verdict([row(2, 0.5), row(11, 0.4, dominant=True)], "accuracy")
    assert "diverged" in verdict([row(2, 0.5), row(11, None, dominant=True, diverged=1)], "accuracy")
    assert "number 2 of 2" in verdict([row(2, sensitivity=3.0), row(11, dominant=True)], "accuracy")
    assert "chooses no layer" in verdict([row(2), row(11)], "accuracy")
    assert "chooses no layer" in verdict([row(2, 0.5), row(11, 0.1)], "accuracy")
    assert "Every training diverged" in verdict([row(2, diverged=1), row(11, dominant=True, diverged=1)], "accuracy")
    assert "No layer lowered the dev loss; the best, layer 11, raised it by 0.1000" in verdict(
        [row(2, -0.2), row(11, -0.1, dominant=True)], "accuracy"
    )


def test_the_verdict_without_training_says_how_sure_it_is():
    behind = verdict(
        [row(2, sensitivity=1.2), row(11, dominant=True), row(12, sensitivity=0.5)], "accuracy", "layer that x"
    )
    assert behind.startswith(
        "The layer that x, 11, is number 2 of 3 in sensitivity, at 1 +- 0.1; layer 2 leads at 1.2 +- 0.1, "
    )
    assert "by 1.4 standard errors, so not clearly" in behind
    clear = verdict([row(2, sensitivity=3.0), row(11, dominant=True)], "accuracy")
    assert "by 14.1 standard errors; no layer was trained" in clear
    first = verdict([row(2, sensitivity=0.9), row(11, dominant=True)], "accuracy")
    assert (
        "is the most sensitive, but not clearly, at 1 +- 0.1, 0.7 standard errors ahead of the next, layer 2;" in first
    )
    assert "is the most sensitive, at" in verdict([row(2, sensitivity=0.1), row(11, dominant=True)], "accuracy")


def test_a_layer_that_a_fallback_chose_is_not_called_the_first_outlier():
    profile = [LayerStatistics(number, 1.0 + number, 1.0, 1.0 + number, 3.0, 0, 0, 0) for number in range(3)]
    assert "outlier" not in FirstOutlierLayer(fallback="max_ratio_jump").select(profile).title


def test_a_measurement_ends_when_it_is_sure_enough(options):
    bench = bench_of(options)
    whole = bench.sensitivity(2, directions=20, seed=5, num_rows=8)
    assert whole.directions == 20
    for share in (1.0, 0.25):
        found = bench.sensitivity(2, directions=20, seed=5, num_rows=8, max_error=share)
        assert 8 <= found.directions <= 20
        assert found.directions == 20 or found.standard_error < share * found.mean
        same = bench.sensitivity(2, directions=found.directions, seed=5, num_rows=8)
        assert (same.mean, same.standard_error) == (found.mean, found.standard_error)
    assert bench.sensitivity(2, directions=20, seed=5, num_rows=8, max_error=1.0).directions == 8


def test_plans():
    plan = plan_sweep(4, None, 10, [1, 1, 2], 20, 8)
    assert plan.layers == (0, 1, 2, 3)
    assert plan.seeds == (1, 2)


def test_the_time_left_follows_the_work_of_the_cells(monkeypatch, capsys):
    """5 s for 10 units: 45 s for the 90 left, and 40 s without 10 that another process has done."""
    now = [100.0]
    monkeypatch.setattr(sweep.time, "monotonic", lambda: now[0])
    clock = sweep._Clock({"sensitivity-0": 10.0, "sensitivity-1": 10.0, "train-0-seed-0": 80.0})
    result = {"mean": 1.0, "standard_error": 0.5, "directions": 20}
    now[0] = 105.0
    clock.tick("sensitivity-0", result)
    clock.forget("sensitivity-1")
    now[0] = 145.0
    clock.tick("train-0-seed-0", result)
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("(5 s; 2 cells left, about 45 s)")
    assert lines[1].endswith("(40 s; done)")


def test_trials_train_on_the_metric_that_fit_would(options):
    cli = build([*options, "--data.objective=metric"], run=False)
    bench = Workbench(cli.model, cli.trainer.attach(cli.model, cli.datamodule))
    batch = next(bench.datamodule.training_batches(4, 0))
    cli.model.tune(1)
    with torch.no_grad():
        found = cli.model.evaluator(EvalCollator()(batch.rows)).predictions
    right = [index in row.example.gold for index, row in zip(found, batch.rows, strict=True)]
    (loss,) = cli.model.loss_of(batch).at([Point({}, 0.0)]).tolist()
    assert loss == pytest.approx(1 - sum(right) / 4)
