"""Short trainings in one process on a tiny model: what they compute, the layer sweep, and the sweep over learning rates."""

import csv
import importlib.util
import json
import math
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import error_line, logged, same_tensors, summary, write_lines

from slzo.__main__ import main
from slzo.cli.app import App, SlzoCLI
from slzo.commands.registry import COMMANDS
from slzo.data.batch import eval_batch
from slzo.experiments import layer_trials, sensitivity, sweep_cells
from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.sensitivity import measure_sensitivity
from slzo.experiments.store import CellStore, changed_options
from slzo.experiments.sweep_cells import complete_cells
from slzo.experiments.sweep_plan import SweepPlan
from slzo.experiments.sweep_rates import RatePlan, RateResult, recommend
from slzo.experiments.sweep_report import LayerResult, SweepResult, layer_curves
from slzo.models.logits import needed_logits
from slzo.training.build import make_stepper, tune
from slzo.training.timing import spaced_batches
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, Backprop, Point
from slzo.zo.objectives import CandidateCrossEntropy
from slzo.zo.optim import OptimizerOptions
from slzo.zo.trial import Score, Trial
from slzo.zo.tuned import UNPERTURBED

SHORT_SCHEDULE = [
    "--model.lr_scheduler=OneCycleLR",
    "--model.lr_scheduler.max_lr=0.1",
    "--model.lr_scheduler.total_steps=3",
    "--model.lr_scheduler.cycle_momentum=false",
]
AUTO = ["--model.estimator=SPSA", "--model.optimizer.lr=auto", "--model.eps=auto"]


def trials_of(options, *more):
    """Trials of a run with these options."""
    cli = SlzoCLI(COMMANDS["sweep"], [*options, "--trainer.logger=false", *more])
    parts, rows = App(cli.trainer, cli.model, cli.datamodule).load()
    return LayerTrials(parts, cli.model.options, rows)


def weights(trials):
    return {name: tensor.clone() for name, tensor in trials.parts.model.named_parameters()}


# ---- trials ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "extra",
    [
        *(
            pytest.param(own, marks=pytest.mark.slow)
            for own in (
                [],
                ["--model.scope=LoRA", "--model.scope.rank=4"],
                ["--model.scope=ActivationSubspace"],
                ["--data.seed=5"],
            )
        ),
        AUTO,
    ],
    ids=lambda extra: " ".join(extra[:1]),
)
def test_a_trial_takes_the_steps_of_fit_and_leaves_the_model_untuned(options, extra):
    """The same losses, scores and measured steps as slzo fit with the same seed and layer."""
    trials = trials_of(options, *extra)
    before = weights(trials)
    trials.run(1, steps=2, seed=3)
    found, (lr, eps) = trials.run(2, steps=8, seed=0), trials.own_step(2)
    assert same_tensors(weights(trials), before)

    fit = [*options, *extra, "--model.layer=2", "--trainer.max_steps=8", "--trainer.val_check_interval=8"]
    assert main(["fit", *fit]) == 0
    plus, minus = (torch.tensor(logged(f"train/loss_{side}")) for side in ("plus", "minus"))
    torch.testing.assert_close(torch.tensor(found.losses), (plus + minus) / 2, rtol=1e-4, atol=1e-5)
    last = found.scores[-1]
    assert last.loss == pytest.approx(logged("val/loss")[-1], rel=1e-4)
    assert last.metric == pytest.approx(logged("val/accuracy")[-1])
    assert last.evaluations == summary()["evaluations"] >= 16
    assert eps == summary()["eps"]
    if extra == AUTO:
        assert last.evaluations > 16
        assert lr == float(f"{lr:.1g}")
        assert 0.5 < lr / logged("train/lr")[0] < 2
    else:
        assert lr == 1e-3


def test_the_own_rate_of_adam_is_that_of_a_step_with_as_many_queries(options):
    adam = [*AUTO, "--model.optimizer=Adam", "--model.optimizer.lr=auto"]
    one, hundred = (trials_of(options, *adam, f"--model.num_queries={number}").own_step(2)[0] for number in (1, 100))
    assert hundred == pytest.approx(one / 10)


def test_a_step_size_that_is_known_is_not_measured_again(options):
    plain, looked = trials_of(options, *AUTO), trials_of(options, *AUTO)
    step = looked.step_size(1)
    assert looked.cost(16).measured == {1}
    expected, found = (trials.run(1, steps=3, seed=0) for trials in (plain, looked))
    assert found.losses == expected.losses
    assert found.scores[-1].loss == expected.scores[-1].loss
    assert found.scores[-1].evaluations == expected.scores[-1].evaluations - step.evaluations
    assert looked.run(1, steps=3, seed=0).losses == expected.losses  # the measurement has not changed
    assert looked.run(1, steps=3, seed=1).losses == plain.run(1, steps=3, seed=1).losses
    given = plain.run(1, steps=2, seed=0, lr=1e-3, eps=1e-3)
    assert given.scores[-1].evaluations == 4


@pytest.mark.parametrize(
    ("extra", "expected"),
    [
        (AUTO, {"caches": True, "measuring": 25, "measures_rate": True}),
        ([], {"measuring": 0, "measures_rate": False}),
        (["--model.engine.cache_gb=0", "--model.num_queries=3"], {"caches": False, "evaluations": 6, "dev_rows": 10}),
        ([*AUTO, "--model.dtype=bfloat16"], {"measuring": 25, "measures_rate": False}),
    ],
)
def test_the_cost_of_a_step_follows_the_options(options, extra, expected):
    trials = trials_of(options, *extra)
    cost = trials.cost(10)
    assert (cost.num_layers, cost.batch_size, cost.head_cost) == (4, 8, 0)
    assert {name: getattr(trials if name == "measures_rate" else cost, name) for name in expected} == expected
    assert trials.cost(1000).dev_rows == trials.num_dev == 16
    assert trials.num_train == 40


def test_some_dev_rows_are_spread_over_the_batches():
    batches = [SimpleNamespace(rows=range(32), place=place) for place in range(7)]
    assert [batch.place for batch in spaced_batches(batches, 96)] == [1, 3, 5]
    assert [batch.place for batch in spaced_batches(batches, 32)] == [3]
    assert spaced_batches(batches, 1000) == batches
    assert spaced_batches([], 96) == []


@pytest.mark.skipif(importlib.util.find_spec("torchao") is None, reason="torchao is not installed")
def test_the_score_before_training_has_the_tuned_layer_in_full_precision(options):
    """The rest of the model is quantized, so it differs from layer to layer."""
    shared, own = (trials_of(options, "--model.quantization=int8") for _ in range(2))
    before = [shared.run(layer, steps=1, seed=0, dev_rows=4).scores[0].loss for layer in (1, 3)]
    assert before[0] != before[1] == own.run(3, steps=1, seed=0, dev_rows=4).scores[0].loss


def test_a_trial_may_use_few_batches_and_dev_rows_and_end_early(options):
    trials, asked = trials_of(options, "--data.eval_batch_size=4"), []
    trial, cache = trials.train(2, 6, dev_rows=4, num_batches=2, checks={4: lambda score: asked.append(score)})
    assert [score.step for score in trial.scores] == [0, 4]
    assert asked == [trial.scores[-1]]
    assert cache.start == 2
    every = trials.run(2, steps=4, seed=0)
    assert trial.losses[:2] == every.losses[:2]
    assert trial.losses[2:] != every.losses[2:]
    assert trial.scores[0].loss != every.scores[0].loss


class Clock:
    """Seconds that pass with each look at the clock."""

    def __init__(self, tick):
        self.now, self.tick = 0.0, tick

    def __call__(self):
        self.now += self.tick
        return self.now


def test_a_trial_for_a_time_is_scored_on_the_way(options, monkeypatch):
    """A step looks at the clock twice, 1 s: with 5 steps asked for it goes on until 23 s are used."""
    trials = trials_of(options)
    plain = trials.run(2, steps=23, seed=0)
    assert [score.step for score in plain.scores] == [0, 23]
    monkeypatch.setattr(layer_trials.time, "perf_counter", Clock(1.0))
    found = trials.run(2, steps=5, seed=0, seconds=22.5)
    curve = [(score.step, score.seconds, score.evaluations) for score in found.scores]
    assert curve == [(step, step, 2 * step) for step in (0, 5, 10, 20, 23)]
    assert found.losses == plain.losses  # scoring on the way changes nothing
    assert found.scores[-1].loss == plain.scores[-1].loss
    few = trials.run(2, steps=12, seed=0, seconds=3)
    assert [score.step for score in few.scores] == [0, 10, 12]  # the steps come first


def test_states_of_a_lower_layer_are_carried_to_the_next_one(options):
    def run(trials):
        """Losses, and the tokens of each pass through the first layer."""
        tokens = []
        first = trials.parts.layers[0]
        handle = first.register_forward_hook(lambda _, inputs, out: tokens.append(inputs[0].shape[1]))
        losses = trials.run(3, steps=3, seed=0).losses
        handle.remove()
        return losses, tokens

    trials, fresh = trials_of(options), trials_of(options)
    trials.run(1, steps=3, seed=0)
    (losses, tokens), (expected, more) = run(trials), run(fresh)
    assert losses == pytest.approx(expected, rel=1e-4)
    assert tokens == run(fresh)[1]  # all are kept by then
    assert len(tokens) <= len(more) - 3


def test_sensitivity_is_the_mean_slope(options):
    """Compared with a plain loop over the whole model, with the same directions."""
    trials = trials_of(options)
    found = measure_sensitivity(trials, 2, directions=20, seed=5)
    rows = next(trials.data.training_batches(5, 16)).packed
    tuned, eps = tune(trials.parts, trials.options, trials.data, 2).tensors, 1e-3
    slopes = []
    with torch.no_grad():
        for query in range(found.directions):
            losses = []
            for sign in (1, -1):
                tuned.write(Point(tuned.draw(5, 0, query), sign * eps))
                logits = needed_logits(trials.parts, rows)
                total, weight = CandidateCrossEntropy().row_losses(logits, rows, False).sum()
                losses.append(float(total / weight))
            slopes.append(abs(losses[0] - losses[1]) / (2 * eps))
    slopes = torch.tensor(slopes)
    assert found.mean == pytest.approx(float(slopes.mean()), rel=1e-2)
    assert found.standard_error == pytest.approx(float(slopes.std() / math.sqrt(len(slopes))), rel=2e-2)


def test_a_sensitivity_ends_when_its_error_is_small_enough(options, monkeypatch):
    trials = trials_of(options)
    monkeypatch.setattr(sensitivity, "_MAX_ERROR", 0.0)
    assert measure_sensitivity(trials, 2, 20, 5).directions == 20
    monkeypatch.setattr(sensitivity, "_MAX_ERROR", 1.0)
    assert measure_sensitivity(trials, 2, 20, 5).directions == 8
    monkeypatch.undo()
    found = measure_sensitivity(trials, 2, 20, 5)
    assert found.directions == 20 or found.standard_error < 0.25 * found.mean
    assert measure_sensitivity(trials, 2, found.directions, 5) == found


def test_divergence_is_reported(options):
    trial = trials_of(options).run(2, steps=6, seed=0, lr=1e38)
    assert trial.diverged
    assert trial.gain == -math.inf
    assert Trial.from_dict(json.loads(json.dumps(asdict(trial)))) == trial


def test_trials_train_on_the_objective_of_fit(options):
    trials = trials_of(options, "--data.objective=metric")
    batch = next(trials.data.training_batches(0, 4))
    model = tune(trials.parts, trials.options, trials.data, 1)
    with torch.no_grad():
        found = trials.data.evaluator(model)(eval_batch(batch.rows)).predictions
        (loss,) = make_stepper(model, trials.options, trials.data).loss(batch).at([UNPERTURBED]).tolist()
    right = [index in row.example.gold for index, row in zip(found, batch.rows, strict=True)]
    assert loss == pytest.approx(1 - sum(right) / 4)


def test_the_end_of_a_schedule_is_one_line(options):
    """Such as after more steps than are tried before a training."""
    trials = trials_of(options, *SHORT_SCHEDULE)
    assert len(trials.run(1, steps=3, seed=3).losses) == 3
    with pytest.raises(
        SlzoError, match=r"^model\.lr_scheduler: .* is 3 \(at step 4 of the training\); correct its init_args$"
    ):
        trials.run(1, steps=5, seed=3)


# ---- the layer sweep -------------------------------------------------------------------------------------------------------

SWEEP = ["--steps=3", "--output=swept", "--directions=20"]
ONLY = "--steps=0"


def sweep_csv(folder="swept"):
    with (Path(folder) / "sweep.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@pytest.mark.plots
def test_a_sweep_writes_table_json_plot_and_a_verdict(options, capsys):
    assert main(["sweep", *options, *SWEEP, "--layers=[3,1]", "--seeds=[0,1]"]) == 0
    output = capsys.readouterr().out
    rows = sweep_csv()
    assert [(row["layer"], row["seeds"], bool(row["loss"])) for row in rows] == [
        ("0", "0", False), ("1", "2", True), ("2", "0", False), ("3", "2", True),
    ]  # fmt: skip
    assert all(float(row["sensitivity"]) > 0 and float(row["sensitivity_se"]) > 0 for row in rows)
    assert sum(row["dominant"] == "True" for row in rows) == 1
    content = json.loads(Path("swept/sweep.json").read_text())
    assert content["verdict"] in output
    assert content["plan"]["layers"] == [1, 3]
    assert Path("swept/sweep.png").stat().st_size > 10_000
    assert "<svg" in Path("swept/sweep.svg").read_text(encoding="utf-8")
    assert " left, about " in output
    assert not Path("runs").exists()


def test_a_sweep_goes_on_where_it_stopped_and_repeats_nothing(options, capsys, monkeypatch):
    calls, run = [], LayerTrials.run

    def interrupted(self, layer, **kwargs):
        calls.append(layer)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return run(self, layer, **kwargs)

    monkeypatch.setattr(LayerTrials, "run", interrupted)
    command = ["sweep", *options, *SWEEP, "--layers=[1,2]"]
    assert main(command) == 130
    assert "the same command continues where it stopped" in capsys.readouterr().err
    assert main(command) == 0
    assert calls == [1, 2, 2]
    first = sweep_csv()
    assert main(command) == 0
    assert len(calls) == 3
    assert sweep_csv() == first


@pytest.mark.slow
def test_a_sensitivity_may_be_followed_by_trainings_of_any_length(options, capsys):
    common = ["sweep", *options, "--output=swept", "--layers=[1]"]
    assert main([*common, ONLY]) == 0
    assert "No layer was trained" in capsys.readouterr().out
    assert all(row["loss"] == "" for row in sweep_csv())
    assert main([*common, "--steps=2"]) == 0
    assert sweep_csv()[1]["loss"] != ""
    for length in ("--steps=3", "--steps=2 --seconds=0.05", "--steps=2 --seconds=0.06"):
        assert main([*common, *length.split()]) == 0
    cells = {path.stem for path in Path("swept/cells").glob("train-1-seed-*.json")}
    threads = torch.get_num_threads()
    ends = ["2", f"2-seconds-0.05-threads-{threads}", f"2-seconds-0.06-threads-{threads}", "3"]
    assert sorted(cell.partition("-steps-")[2] for cell in cells) == ends


@pytest.mark.fast
def test_trainings_for_a_time_are_those_of_one_number_of_threads(monkeypatch):
    timed, plain = (SweepPlan((1,), 2, (0,), 0, seconds) for seconds in (60.0, None))
    names = []
    for threads in (1, 2):
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        names += [timed.training_cell(1, 0), plain.training_cell(1, 0)]
    assert len(set(names)) == 3


def test_layers_can_be_added_to_a_sweep(options, capsys):
    command = ["sweep", *options, "--steps=2", "--directions=0", "--output=added"]
    assert main([*command, "--layers=[1,2]"]) == 0
    assert main([*command, "--layers=[3]"]) == 0
    rows = json.loads(Path("added/sweep.json").read_text())["layers"]
    assert [row["layer"] for row in rows if row["loss"] is not None] == [1, 2, 3]


@pytest.mark.slow
def test_a_sweep_into_a_folder_of_another_configuration_is_refused(options, capsys):
    command = ["sweep", *options, *SWEEP, ONLY]
    assert main(command) == 0
    before = {path: path.read_bytes() for path in Path("swept").rglob("*") if path.is_file()}
    assert "eps: 0.001 -> 0.002" in error_line(capsys, *command, "--model.eps=2e-3")
    queries = ["--model.estimator=SPSA", "--model.num_queries=2"]
    assert "model.num_queries: 1 -> 2" in error_line(capsys, *command, *queries)
    assert before == {path: path.read_bytes() for path in Path("swept").rglob("*") if path.is_file()}
    Path("mine").mkdir()
    Path("mine/thesis.txt").write_text("precious")
    assert "holds other files" in error_line(capsys, "sweep", *options, "--output=mine")
    CellStore("other", {"kind": "reproduce_tables"}).save("x", {})
    for extra in ([], [ONLY]):
        refused = error_line(capsys, "sweep", *options, "--output=other", *extra)
        assert "holds results of other settings" in refused


def test_a_sweep_of_rates_is_refused_before_the_model_is_read(options, capsys):
    command = ["sweep", *options, "--steps=1", "--lrs=[1e-3]", "--output=rates"]
    assert main([*command, "--model.layer=1"]) == 0
    capsys.readouterr()
    assert main([*command, "--model.layer=2"]) == 2
    out, error = capsys.readouterr()
    assert "holds results of other settings (model.layer: 1 -> 2); give another folder" in error
    assert "held-out rows" not in out  # no row was read
    assert main([*command, "--model.layer=1", "--data.num_train=15"]) == 2
    out, error = capsys.readouterr()
    assert "holds results of other settings (other training rows" in error
    assert "median |h|" not in out  # no layer was profiled


@pytest.mark.parametrize(
    ("old", "new", "text"),
    [
        (
            {"model.eps": 0.1, "data.batch_size": 4},
            {"model.eps": 0.2, "data.batch_size": 8},
            "data.batch_size: 4 -> 8; model.eps: 0.1 -> 0.2",
        ),
        (
            {"model.scope": "LoRA", "model.scope.rank": 8},
            {"model.scope": "LayerScope"},
            "model.scope: LoRA -> LayerScope",
        ),
        (
            {"model.scope": "LoRA", "model.scope.rank": 8},
            {"model.scope": "LoRA", "model.scope.rank": 4},
            "model.scope.rank: 8 -> 4",
        ),
        (
            {"model.seed": 0, "data.seed": 0, "dev rows": "1"},
            {"model.seed": 4, "data.seed": 4, "dev rows": "2"},
            "seed_everything (or model.seed and data.seed): 0 -> 4; other dev rows",
        ),
        ({"model.seed": 0, "data.seed": 0}, {"model.seed": 4, "data.seed": 0}, "model.seed: 0 -> 4"),
        ({"model.seed": 0, "data.seed": 0}, {"model.seed": 0, "data.seed": 4}, "data.seed: 0 -> 4"),
    ],
)
def test_other_settings_have_the_names_of_options(old, new, text):
    assert changed_options(old, new) == text


def test_a_sweep_of_another_task_or_other_rows_of_the_same_name_is_refused(options, capsys):
    for name in ("train", "test"):
        write_lines(f"{name}.jsonl", [{"text": f"{name} {n}", "label": n % 2} for n in range(24)])
    task = {"candidates": [" bad", " good"], "train_file": "train.jsonl", "test_file": "test.jsonl"}

    def command(prompt):
        given = json.dumps({"class_path": "slzo.tasks.template.TemplateTask", "init_args": task | {"prompt": prompt}})
        return ["sweep", *options, *SWEEP, ONLY, "--data.data_dir=null", f"--data.task={given}"]

    assert main(command("{text} is")) == 0
    assert "task.prompt: {text} is -> {text} was" in error_line(capsys, *command("{text} was"))
    train = Path("train.jsonl")
    train.write_text(train.read_text(encoding="utf-8").replace("train 3", "other 3"), encoding="utf-8")
    assert "(other training rows, see data.num_train, data.num_dev, data.seed and the files)" in error_line(
        capsys, *command("{text} is")
    )


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--layers=[9]"], r"layers 9: the model has 4 decoder layers"),
        (["--model.layer=9"], r"model.layer 9: the model has 4 decoder layers"),
        (["--layers=1"], r"layers '1': expected a list like \[1, 2\] or null"),
        (["--layers=[]"], r"layers \[\]: give at least one layer"),
        (["--directions=3"], r"directions 3: .*at least 20"),
        (["--directions=0", "--steps=0"], r"steps 0, directions 0: leave nothing to do"),
        (["--steps=-1"], r"steps -1"),
        (["--seeds=[]"], r"seeds \[\]"),
        (["--seconds=0"], r"seconds 0.0: give a number above 0"),
        (["--seconds=.inf"], r"seconds inf: give a number above 0"),
        (["--model.scope=AllParameters"], r"model\.scope: a sweep varies the dominant layer"),
        (["--lrs=[1e-3]", "--layers=[1]"], r"layers \[1\]: leave it out, as lrs and eps compare rates in one layer"),
        (["--lrs=[1e-3]", "--directions=40"], r"directions 40: leave it out, as lrs and eps"),
        (["--steps=0", "--seconds=5"], r"seconds 5.0: with steps 0 nothing is trained; leave it out, or give steps"),
        (["--steps=0", "--model.eps=1e25"], r"model.eps 1e\+25: the loss of layer 0 is not finite at this distance"),
        (["--lrs=[0]"], r"lrs \[0.0\]: give numbers above 0"),
        (
            [*SHORT_SCHEDULE, "--steps=12", "--model.model=missing"],
            r"model\.lr_scheduler: .* total steps is 3 \(the run takes 12",
        ),
    ],
)
def test_bad_sweep_options(options, capsys, extra, message):
    assert re.match(rf"slzo: error: {message}", error_line(capsys, "sweep", *options, "--output=swept", *extra))
    assert not list(Path().glob("swept/cells/*.json"))


@pytest.mark.plots
def test_a_sweep_for_a_time_compares_after_the_same_steps_and_the_same_time(options, capsys):
    """And without the sensitivity."""
    plan = ["--steps=3", "--output=swept", "--directions=0", "--layers=[1,3]", "--seconds=0.2"]
    assert main(["sweep", *options, *plan]) == 0
    assert {row["sensitivity"] for row in sweep_csv()} == {""}
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
    assert content["verdict"] in capsys.readouterr().out
    assert re.match(
        r"In 3 steps: .*[13],? has the lowest dev loss.* In 0\.2 s: .*[13],? has the lowest", content["verdict"]
    )
    assert content["plan"]["seconds"] == 0.2


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


def test_a_damaged_file_is_named(tmp_path):
    store = CellStore(tmp_path, {"steps": 1})
    store.save("a", {})
    for path in (tmp_path / "cells/a.json", tmp_path / "settings.json"):
        path.write_text("")
        with pytest.raises(SlzoError, match=rf"{path.name}': cannot be read .*; remove it"):
            CellStore(tmp_path, {"steps": 1}).result("a")


def test_a_folder_without_results_takes_other_settings(tmp_path):
    CellStore(tmp_path / "s", {"eps": 1})
    CellStore(tmp_path / "s", {"eps": 2}).save("x", {})
    with pytest.raises(SlzoError, match="eps: 2 -> 3"):
        CellStore(tmp_path / "s", {"eps": 3})


def test_a_folder_that_another_process_works_in_keeps_its_settings(tmp_path):
    """Its first cell may take minutes."""
    store = CellStore(tmp_path / "s", {"eps": 1})
    with store.claim("x"):
        CellStore(tmp_path / "s", {"eps": 1})
        with pytest.raises(SlzoError, match="eps: 1 -> 2"):
            CellStore(tmp_path / "s", {"eps": 2})
    CellStore(tmp_path / "s", {"eps": 2})
    with pytest.raises(SlzoError, match="eps: 2 -> 1"), store.claim("x"):  # it was overtaken before its first cell
        pass


def test_the_time_left_is_at_the_pace_of_all_processes(monkeypatch, capsys, tmp_path):
    """After 6 s and 12 s, in the first of which another process has also done a cell."""
    now, folder = [100.0], CellStore(tmp_path / "s", {})
    monkeypatch.setattr(sweep_cells.time, "monotonic", lambda: now[0])

    def measure(seconds):
        now[0] += seconds
        folder.save("other", {})
        return {"mean": 1.0, "standard_error": 0.5, "directions": 20}

    cells = {name: partial(measure, s) for name, s in {"a": 6.0, "b": 12.0, "other": 1.0, "c": 2.0}.items()}
    complete_cells(folder, cells, "dev loss")
    ends = [line.partition("(")[2] for line in capsys.readouterr().out.splitlines()]
    assert ends == ["2 left, about 6 s)", "1 left, about 6 s)", "done)"]


def curve(*points):
    return [Score(step, 2 * step, seconds, loss, 0.5) for step, seconds, loss in points]


def test_curves_are_means_over_seeds_at_the_same_steps(tmp_path):
    """Seeds end at other steps; those on the way are not mixed with the last ones."""
    store, plan = CellStore(tmp_path / "s", {}), SweepPlan((2, 3), 20, (0, 1, 1), 20, 30.0).of_model(4)
    assert plan.seeds == (0, 1)
    scores = {
        (2, 0): curve((0, 0, 1.0), (10, 4, 0.8), (20, 8, 0.6), (71, 30, 0.5)),
        (2, 1): curve((0, 0, 1.0), (10, 6, 0.6), (20, 12, 0.4), (40, 20, 0.3), (59, 31, 0.1)),
        (3, 0): curve((0, 0, 1.0), (10, 4, 0.9), (20, 8, 0.7)),
        (3, 1): curve((0, 0, 1.0), (10, 4, 9.0)),
    }
    for (layer, seed), own in scores.items():
        diverged = "up" if (layer, seed) == (3, 1) else ""
        store.save(plan.training_cell(layer, seed), asdict(Trial(tuple(own), (1.0,), 1.0, diverged)))
    found = layer_curves(SweepResult.of(store, plan, (), None, "dev loss").curves)
    assert [(score.step, score.evaluations) for score in found[2]] == [(0, 0), (10, 20), (20, 40), (65, 130)]
    assert [score.seconds for score in found[2]] == pytest.approx([0, 5, 10, 30.5])
    assert [score.loss for score in found[2]] == pytest.approx([1.0, 0.7, 0.5, 0.3])
    assert found[3] == scores[3, 0]


def test_the_verdict_reads_curves_where_they_were_not_scored():
    """Halfway between two scores the loss is halfway too; a loss that rises again does not count."""
    plan = SweepPlan(None, 20, (0,), 20, 30.0).of_model(4)
    curves = {
        1: [curve((0, 0, 1.0), (20, 10, 0.5), (40, 20, 0.45), (80, 40, 0.35))],
        2: [curve((0, 0, 1.0), (20, 28, 0.42), (24, 32, 0.46))],
    }
    one = "from one seed, so without a standard error"

    def verdict(dominant):
        rows = [row(layer, 0.1, layer == dominant) for layer in curves]
        rows += [] if dominant in curves else [row(dominant, None, True)]
        return SweepResult(rows, plan, curves, "chosen layer", "dev loss").verdict()

    assert verdict(2) == (
        f"In 20 steps: The chosen layer, 2, has the lowest dev loss, 0.42; layer 1 has 0.5, {one}. "
        f"In 30 s: Layer 1 has the lowest dev loss, 0.4; the chosen layer, 2, has 0.42, {one}."
    )
    curves[2].append(curve((0, 0, 1.0), (20, 28, 0.44), (24, 32, 0.48)))
    assert "layer, 2, has the lowest dev loss, 0.43 ± 0.01; layer 1 has 0.5, from one seed" in verdict(2)
    assert "the chosen layer, 3, diverged or was not among those trained." in verdict(3)


def row(layer, gain=None, dominant=False, sensitivity=1.0, diverged=0, se=0.01):
    loss = None if gain is None else 1 - gain
    return LayerResult(layer, sensitivity, 0.1, 10.0, 1, 1.0, loss, se, gain, 0.5, 0.1, 1.0, 1.0, diverged, dominant)


@pytest.mark.parametrize(
    ("rows", "parts"),
    [
        ([row(2, 0.1), row(11, 0.4, True)],
         ["The chosen layer, 11, has the lowest dev loss, 0.6 ± 0.01;", "layer 2 has 0.9 ± 0.01, 21.2 standard errors"]),
        ([row(2, 0.39), row(11, 0.4, True)],
         ["chosen layer, 11, has the lowest", "0.7 standard errors behind, which may be noise"]),
        ([row(2, 0.41), row(11, 0.4, True)],
         ["Layer 2 has the lowest", "the chosen layer, 11, has 0.6 ± 0.01, 0.7 standard errors behind, which may"]),
        ([row(2, 0.1, se=None), row(11, 0.4, True, se=None)], ["from one seed, so without a standard error"]),
        ([row(2, 0.5), row(11, 0.4, True)], ["Layer 2 has the lowest", "the chosen layer, 11, has 0.6 ± 0.01, 7.1 standard"]),
        ([row(2, 0.5), row(11, None, True, diverged=1)], ["diverged"]),
        ([row(2, 0.5), row(11, 0.1)], ["chooses no layer"]),
        ([row(2, diverged=1), row(11, None, True, diverged=1)], ["In every layer a training diverged", "slzo sweep --lrs auto"]),
        ([row(2, 0.5, diverged=1), row(11, 0.4, True), row(12, 0.1)],
         ["The chosen layer, 11, has the lowest dev loss", "layer 12 has", "Layers with diverged trainings are left out: 2."]),
        ([row(2, 0.0), row(11, -0.1, True)], ["No layer lowered the dev loss; the best, layer 2, did not change it."]),
        ([row(2, sensitivity=0.0), row(11, None, True, sensitivity=0.0)], ["No direction changed the loss: give a larger"]),
        ([row(2, -0.2), row(11, -0.1, True)], ["No layer lowered the dev loss", "layer 11, raised it by 0.1."]),
        ([row(2), row(11)], ["chooses no layer"]),
        ([row(2, sensitivity=1.2), row(11, None, True), row(12, sensitivity=0.5)],
         ["Layer 2 has the highest sensitivity, 1.2 ± 0.1; the chosen layer, 11, has 1 ± 0.1, 1.4 standard errors behind,"]),
        ([row(2, sensitivity=3.0), row(11, None, True)], ["11, has 1 ± 0.1, 14.1 standard errors behind. No layer was"]),
        ([row(2, sensitivity=0.9), row(11, None, True)],
         ["chosen layer, 11, has the highest sensitivity, 1 ± 0.1; layer 2 has 0.9 ± 0.1, 0.7 standard errors behind, which"]),
        ([row(2, sensitivity=0.1), row(11, None, True)], ["The chosen layer, 11, has the highest sensitivity"]),
    ],
)  # fmt: skip
def test_verdicts(rows, parts):
    found = SweepResult(rows, SweepPlan(None, 20, (0,), 20), {}, "chosen layer", "dev loss").verdict()
    assert [part for part in parts if part not in found] == [], found


# ---- the sweep over learning rates -----------------------------------------------------------------------------------------


def test_a_given_layer_is_the_one_that_others_are_compared_with(options, capsys):
    assert main(["sweep", *options, *SWEEP, "--directions=0", "--layers=[1,2]", "--model.layer=2"]) == 0
    assert re.search(r"the chosen layer, 2,", capsys.readouterr().out, re.IGNORECASE)


def test_a_sweep_over_rates_recommends_one_and_goes_on(options, capsys, monkeypatch):
    command = ["sweep", *options, "--steps=4", "--lrs=[1e-3,1e-2,1e38]", "--output=rates"]
    assert main(command) == 0
    output = capsys.readouterr().out
    assert "lr 1e+38, eps 0.001: diverged" in output
    content = json.loads(Path("rates/rates.json").read_text())
    assert [pair["lr"] for pair in content["tried"]] == [1e-3, 1e-2, 1e38]
    assert content["tried"][2]["loss"] is None
    assert content["reason"] in output
    layer, best = content["settings"]["model.layer"], content["recommendation"]
    assert (
        f"Options    --model.layer {layer} --model.eps {best['eps']:.6g} --model.optimizer.lr {best['lr']:.6g}"
        in output
    )
    monkeypatch.setattr(LayerTrials, "run", None)
    assert main(command) == 0
    assert "num_queries: 1 -> 2" in error_line(capsys, *command, "--model.num_queries=2")


def test_the_own_rate_is_measured_once_for_all_processes_on_a_folder(options, monkeypatch):
    """Another machine measures other last digits, with which all trials would be run again."""
    command = ["sweep", *options, "--steps=1", "--lrs=auto", "--model.eps=auto", "--model.layer=1", "--output=rates"]
    assert main(command) == 0
    before = json.loads(Path("rates/rates.json").read_text())
    monkeypatch.setattr(LayerTrials, "run", None)
    monkeypatch.setattr(LayerTrials, "own_step", None)
    assert main(command) == 0
    assert json.loads(Path("rates/rates.json").read_text()) == before


def test_sizes_of_the_perturbation_are_compared_with_each_rate(options):
    command = ["sweep", *options, "--steps=1", "--lrs=[1e-3,1e-2]", "--eps=[1e-3,1e-2]", "--model.scope=AllParameters"]
    assert main(command) == 0
    (file,) = Path("sweeps").glob("*-sst2-rates/rates.json")
    tried = json.loads(file.read_text())["tried"]
    assert [(pair["eps"], pair["lr"]) for pair in tried] == [(1e-3, 1e-3), (1e-3, 1e-2), (1e-2, 1e-3), (1e-2, 1e-2)]


@pytest.mark.parametrize(
    ("tried", "best", "words"),
    [
        ([(1e-4, 0.9), (1e-3, 0.6), (1e-2, None)], 1e-3, "From lr 0.01 on training diverges"),
        ([(1e-4, 0.9), (1e-3, 0.6)], 1e-3, "largest rate of the grid"),
        ([(1e-4, 0.5), (1e-3, 0.6)], 1e-4, "smallest rate of the grid"),
        ([(1e-4, 0.999), (1e-3, 1.2)], None, "No rate lowered"),
        ([(1e-4, None)], None, "Every rate diverged"),
    ],
)
def test_recommendations(tried, best, words):
    pairs = [RateResult(lr, 1e-3, loss or math.inf, 0.5, "" if loss else "up") for lr, loss in tried]
    found, reason = recommend(pairs, 1.0, "dev loss")
    assert (found and found.lr) == best
    assert words in reason
    assert ("of the grid" in reason) == ("of the grid" in words)


def test_a_distance_below_0_that_rose_is_not_recommended():
    """Such as minus a reward."""
    assert recommend([RateResult(1e-3, None, -18.95, 0.5, "")], -19.0, "dev loss")[0] is None
    assert recommend([RateResult(1e-3, None, -20.0, 0.5, "")], -19.0, "dev loss")[0] is not None


@pytest.mark.parametrize("lrs", [[], ["--lrs=[1e-3]"]])
def test_a_sweep_needs_dev_rows(options, lrs, capsys):
    line = error_line(capsys, "sweep", *options, *lrs, "--steps=2", "--model.layer=1", "--data.num_dev=0")
    assert "data.num_dev 0: trainings are compared by their dev loss, and there are none" in line


def test_rates_are_planned_around_the_own_rate_where_none_are_given():
    def fails():
        raise AssertionError

    def values(lrs, eps, own):
        return RatePlan(lrs, eps, 4, [0]).values(own)

    rates, sizes = values(None, None, lambda: (3e-4, 1e-3))
    assert len(rates) == 7
    assert rates[3] == pytest.approx(3e-4)
    assert rates[-1] / rates[0] == pytest.approx(1000)
    assert sizes == [1e-3]
    assert values([1e-3, 1e-4, 1e-3], [1e-2], fails) == ([1e-4, 1e-3], [1e-2])
    assert values([1e-3], None, lambda: (1.0, 2e-2)) == ([1e-3], [2e-2])
    assert values(None, [1e-2], lambda: (5.0, 1.0))[0][3] == 5.0
    for bad in ({"lrs": [0.0]}, {"lrs": []}, {"eps": [-1.0]}, {"steps": 0}, {"seeds": []}):
        arguments = {"lrs": [1e-3], "eps": None, "steps": 4, "seeds": [0]} | bad
        with pytest.raises(SlzoError, match=next(iter(bad))):
            RatePlan(**arguments).check(SPSA(), OptimizerOptions.of(torch.optim.SGD))
    with pytest.raises(SlzoError, match=r"^eps \[0.1\]: Backprop has no eps"):
        RatePlan(None, [0.1], 4, [0]).check(Backprop(), OptimizerOptions.of(torch.optim.AdamW))


def test_rates_are_not_compared_if_the_scheduler_replaces_them():
    adam = partial(torch.optim.AdamW, lr=1e-3)
    own = OptimizerOptions.of(adam, partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=1e-3, total_steps=8))
    for lrs in ([1e-4, 1e-3], None):
        with pytest.raises(SlzoError, match=r"^model.lr_scheduler OneCycleLR: sets the rate itself"):
            RatePlan(lrs, None, 4, [0]).check(Backprop(), own)
    RatePlan([1e-3, 1e-3], None, 4, [0]).check(Backprop(), own)
    warm_up = partial(torch.optim.lr_scheduler.LambdaLR, lr_lambda=lambda step: step / 4)
    for scheduler in (None, warm_up, partial(torch.optim.lr_scheduler.CosineAnnealingLR, T_max=4)):
        RatePlan([1e-4, 1e-3], None, 4, [0]).check(Backprop(), OptimizerOptions.of(adam, scheduler))
