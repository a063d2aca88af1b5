"""The default rule: LargestFall's layer, unless it is unclear or its first step promises little; then a race."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import run_dir
from test_cli import bad
from test_profile import statistics
from test_race import MAGNITUDES, FakeBench

from slzo.__main__ import main
from slzo.callbacks.outlier_profiler import OutlierProfiler
from slzo.cli import build
from slzo.utils.errors import SlzoError
from slzo.experiments.checked_choice import checked_choice
from slzo.experiments.trial import Workbench
from slzo.zo import AutoStep
from slzo.zo.selection import Auto, LargestFall
from slzo.zo.selection.base import Choice, Margin

GAINS = {11: 0.02, 28: 0.001, 29: 0.002}
STRAIGHT = AutoStep(eps=1e-3, loss=1.0, square=25.0)  # the first step is to lower the loss by 4.5%
CURVED = AutoStep(eps=1e-3, loss=1.0, square=25.0, curvature=7500.0)  # by 25 x 0.3 / 7500 = 0.1%


class Bench(FakeBench):
    def __init__(self, step, automatic=True, generates=False):
        super().__init__(GAINS)
        self.step, self.measured = step, []
        self.module.optimizer_choice = SimpleNamespace(automatic=automatic)
        self.datamodule.objective = SimpleNamespace(generates=generates)

    def measured_step(self, layer):
        self.measured.append(layer)
        return self.step


def half(bench):
    bench.module.parts.model.dtype = torch.bfloat16
    return bench


class Unclear(Auto):
    def select(self, layers):
        return super().select(layers)._replace(margin=Margin(1.5, "layer 28's fall is near layer 29's"))


def chosen(bench, rule=None, steps=3200):
    return checked_choice(bench, rule or Auto(), statistics(*MAGNITUDES), steps)


def test_a_promising_layer_is_taken_after_one_look():
    bench = Bench(STRAIGHT)
    assert chosen(bench).choice == LargestFall().select(statistics(*MAGNITUDES))
    assert (bench.measured, bench.asked) == ([28], [])


def test_where_the_first_step_promises_little_a_race_decides(capsys):
    bench = Bench(CURVED)
    found = chosen(bench)
    assert sorted(found.trials) == [11, 28, 29]
    assert found.choice.layer == max(found.trials, key=lambda layer: found.trials[layer].gain)
    why = "the first step there is to lower the loss by 0.10%, less than profiler.rule.promise, 1.00%"
    assert found.choice.note == f"Layer 28 is LargestFall's: {why}."
    assert f"{why}. A race decides; --model.layer 28 goes without." in capsys.readouterr().out
    assert chosen(Bench(CURVED), Auto(promise=0.0005)).trials == {}


def test_where_the_statistics_are_unclear_a_race_decides_without_a_look():
    bench = Bench(STRAIGHT)
    found = chosen(bench, Unclear())
    assert bench.measured == []
    assert sorted(found.trials) == [11, 28, 29]
    assert "not clear, layer 28's fall is near layer 29's" in found.choice.note


@pytest.mark.parametrize(
    ("bench", "steps", "looks"),
    [
        (Bench(CURVED, automatic=False), 3200, 0),
        (Bench(CURVED, generates=True), 3200, 0),
        (half(Bench(CURVED)), 3200, 0),
        (Bench(CURVED), 20, 0),
        (Bench(AutoStep(eps=1e-3, loss=1.0, square=1e-4, largest=1e-3)), 3200, 1),
    ],
    ids=["rate given", "generated answers", "half precision", "no room", "LoRA"],
)
def test_elsewhere_the_statistics_decide(bench, steps, looks):
    assert chosen(bench, steps=steps).choice.layer == 28
    assert len(bench.measured) == looks
    assert bench.asked == []


def test_a_step_that_cannot_be_measured_is_left_to_the_training():
    class Fails(Bench):
        def measured_step(self, layer):
            raise SlzoError("the loss is nan before training")

    assert chosen(Fails(None)).choice == LargestFall().select(statistics(*MAGNITUDES))


def test_a_race_that_nobody_wins_leaves_the_layer_and_says_both():
    bench = Bench(CURVED)
    bench.gains = dict.fromkeys(GAINS, -0.001)
    choice = chosen(bench).choice
    assert choice.layer == 28
    assert "less than profiler.rule.promise, 1.00%. LargestFall has chosen: no layer lowered" in choice.note


def test_one_candidate_needs_no_race(monkeypatch):
    monkeypatch.setattr(LargestFall, "select", lambda self, layers: Choice(2, "as the others"))
    assert Auto().race(statistics((1, 1), (1, 1), (90000, 2000))) is None


def test_it_is_the_default(model_dir):
    assert isinstance(OutlierProfiler().rule, Auto)
    cli = build([f"--model.model={model_dir}", "--trainer.accelerator=cpu"], run=False)
    assert cli.config["profiler"]["rule"]["class_path"].endswith("Auto")


@pytest.mark.parametrize(
    ("option", "told"),
    [
        ("promise=-0.1", "profiler.rule.promise -0.1: a share of the loss, 0 or more"),
        ("share=0", "profiler.rule.share 0.0: must be above 0"),
    ],
)
def test_bad_options_are_one_line(options, capsys, option, told):
    assert told in bad(capsys, "fit", *options, "--profiler.rule=Auto", f"--profiler.rule.{option}")


DOUBTED = [
    "--trainer.max_steps=20",
    "--profiler.rule=Auto",
    "--profiler.rule.share=5",
    "--profiler.rule.promise=100",
    "--model.optimizer.lr=auto",
]


def test_a_fit_in_doubt_tunes_the_winner_of_a_race(options, capsys):
    assert main(["fit", *options, *DOUBTED]) == 0
    saved = json.loads((run_dir() / "race.json").read_text())
    profile = json.loads((run_dir() / "outlier_profile.json").read_text())
    assert profile["dominant_layer"] == saved["layer"]
    assert json.loads((run_dir() / "summary.json").read_text())["dominant_layer"] == saved["layer"]
    assert "A race decides" in capsys.readouterr().out


def test_a_look_leaves_the_training_as_it_is(options, monkeypatch):
    """A training after it is the one that model.layer gives."""
    looks, measured_step = [], Workbench.measured_step
    monkeypatch.setattr(Auto, "select", lambda self, layers: Choice(1, "tested"))
    monkeypatch.setattr(
        Workbench, "measured_step", lambda self, layer: looks.append(layer) or measured_step(self, layer)
    )
    assert main(["fit", *options, *DOUBTED, "--profiler.rule.promise=0"]) == 0
    assert looks == [1]
    same = ["--trainer.max_steps=20", "--model.optimizer.lr=auto", "--model.layer=1"]
    assert main(["fit", *options, *same]) == 0
    one, other = (json.loads((run_dir(n) / "history.json").read_text())["points"] for n in (0, 1))
    assert [point["loss"] for point in one] == [point["loss"] for point in other]


def test_a_scope_without_a_layer_is_not_looked_at(options, capsys):
    assert main(["profile", *options, *DOUBTED, "--model.scope=AllParameters"]) == 0
    assert "A race decides" not in capsys.readouterr().out


def test_a_sweep_races_nobody(options, capsys, tmp_path):
    """It trains the layers itself."""
    more = ["--layers=[0]", "--steps=2", "--directions=20", f"--output={tmp_path / 'sweep'}"]
    assert main(["sweep", *options, *DOUBTED, *more]) == 0
    assert "A race decides" not in capsys.readouterr().out
