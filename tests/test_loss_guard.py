"""The guard that takes a run back when the dev loss jumps."""

import json
import math
import re

import pytest
import torch
from conftest import run_dir, tuned
from test_cli import bad
from torch import nn
from torch.optim import lr_scheduler

from slzo.__main__ import main
from slzo.callbacks.loss_guard import LossGuard
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.datamodule import Judge, TaskDataModule
from slzo.zo.go_back import halve_rate

JUMPS = [
    "--model.optimizer.lr=0.1",
    "--trainer.enable_progress_bar=false",
    "--model.scope=AllParameters",
    "--guard.factor=1.2",
]


def summary(number=0):
    return json.loads((run_dir(number) / "summary.json").read_text())


def kept(path):
    content = read_checkpoint(path).content
    return content, next(state for name, state in content["callbacks"].items() if "LossGuard" in name)


def last(number=0):
    return run_dir(number) / "checkpoints" / "last.ckpt"


def told(output):
    """Loss, lowest loss and step of each time that a run was taken back."""
    pattern = (
        r"rose to (\S+), over 1.2 times its lowest, (\S+): learning rate halved, weights back at those of step (\d+)"
    )
    return [(float(loss), float(lowest), int(step)) for loss, lowest, step in re.findall(pattern, output)]


def test_a_run_that_jumps_is_taken_back_with_half_the_rate(options, capsys):
    assert main(["fit", *options, *JUMPS]) == 0
    output, found = capsys.readouterr().out, summary()
    times = told(output)
    assert 1 <= len(times) == found["times_taken_back"]
    assert f"Taken back {'once,' if len(times) == 1 else f'{len(times)} times'}" in output
    assert all(not loss <= 1.2 * lowest for loss, lowest, _ in times)
    assert found["lr_at_end"] == pytest.approx(0.1 / 2 ** len(times))
    content, state = kept(last())
    assert state["times"] == len(times)
    # the best weights, those before training where no validation was better
    assert state["lowest"] == pytest.approx(min(times[0][1], *(v["loss"] for v in found["validations"])), rel=1e-3)
    if not found["validations"][-1]["loss"] <= 1.2 * state["lowest"]:  # taken back at the end
        assert all(torch.equal(content["state_dict"][name], good) for name, good in state["good"].items())


def test_the_weights_are_those_of_the_step_that_it_names(options, model_dir, capsys):
    from transformers import AutoModelForCausalLM

    assert main(["fit", *options, *JUMPS, "--trainer.max_steps=2"]) == 0
    ((_, _, step),) = told(capsys.readouterr().out)
    assert step == 0
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned(last()).items())


def test_a_measured_rate_is_halved_too(options, monkeypatch, capsys):
    from slzo.zo import step_size

    monkeypatch.setattr(step_size, "_SHARE", 30.0)
    given = [option for option in options if not option.startswith("--model.optimizer")]
    assert main(["fit", *given, *JUMPS[1:]]) == 0
    times = len(told(capsys.readouterr().out))
    assert times >= 1
    content, _ = kept(last())
    assert content["slzo"]["step_size"]["factor"] == 0.5**times
    found = content["slzo"]["step_size"]
    most = 0.3 / found["curvature"] if found["curvature"] > 0 else math.inf
    rate = min(30 * found["loss"] / found["square"], most) / (1 + found["steps"] / 100)
    assert summary()["lr_at_end"] == pytest.approx(0.5**times * rate)


@pytest.mark.parametrize(
    ("best", "rows", "factor"),
    [(None, 25, "1.14"), (None, 4, "1.35"), (1.0, 25, "1.4")],
)
def test_left_out_the_factor_depends_on_the_number_of_dev_rows(options, monkeypatch, capsys, best, rows, factor):
    found = iter([2.0, *[9.0] * 9])
    monkeypatch.setattr(Judge, "distance", lambda self, values, prefix="": next(found))
    if best is not None:
        monkeypatch.setattr(TaskDataModule, "judge", Judge("loss", "accuracy", best))
    given = [option for option in options if "num_dev" not in option]
    steps = ["--model.layer=1", "--trainer.max_steps=2", "--summary.test_before=false"]
    assert main(["fit", *given, *steps, f"--data.num_dev={rows}"]) == 0
    assert f"rose to 9, over {factor} times its lowest, 2" in capsys.readouterr().out


def test_momentum_of_what_went_wrong_is_forgotten(options, capsys):
    """Without that the next step goes the way of the last ones, however small its own rate."""
    momentum = ["--model.optimizer.momentum=0.9", "--trainer.max_steps=2"]
    assert main(["fit", *options, *JUMPS, *momentum]) == 0
    assert told(capsys.readouterr().out)
    content, _ = kept(last())
    assert not content["optimizer_states"][0]["state"]


def test_a_rate_beyond_all_bounds_ends_where_it_began(options, capsys):
    """Losses that are not finite, too, take the run back."""
    assert main(["fit", *options, "--model.layer=1", "--model.optimizer.lr=1e38"]) == 0
    found, (_, state) = summary(), kept(last())
    assert found["times_taken_back"] == 4
    assert found["skipped_steps"] > 0
    assert state["lowest"] < math.inf
    assert found["score_after"] == found["score_before"]


def test_a_resumed_run_goes_on_as_it_would_have(options, capsys):
    options = [*options, *JUMPS, "--trainer.max_steps=8"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    (whole, first), (resumed, second) = kept(last(0)), kept(last(2))
    assert first["times"] >= 1
    assert {k: v for k, v in first.items() if k != "good"} == {k: v for k, v in second.items() if k != "good"}
    assert all(torch.equal(first["good"][name], second["good"][name]) for name in first["good"])
    assert all(torch.equal(whole["state_dict"][name], resumed["state_dict"][name]) for name in whole["state_dict"])
    assert summary(0)["times_taken_back"] == summary(2)["times_taken_back"]
    assert summary(0)["lr_at_end"] == summary(2)["lr_at_end"]


def test_null_lets_a_run_go_on(options, capsys):
    assert main(["fit", *options, *JUMPS, "--guard.factor=null"]) == 0
    assert not told(capsys.readouterr().out)
    assert (summary()["times_taken_back"], summary()["lr_at_end"]) == (0, 0.1)
    assert kept(last())[1]["good"] is None


@pytest.mark.parametrize("factor", ["0.5", "1", ".inf", "-2"])
def test_a_factor_that_makes_no_sense_is_one_line(options, capsys, factor):
    line = bad(capsys, "fit", *options, f"--guard.factor={factor}")
    assert re.search(
        r"guard\.factor -?[\d.inf]+: must be above 1, or auto, or null to guard nothing; 1\.05 is usual", line
    )


def test_a_calm_run_is_left_alone(options):
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert summary()["times_taken_back"] == 0
    content, state = kept(last())
    assert (state["times"], summary()["lr_at_end"]) == (0, 1e-3)
    assert content["optimizer_states"]


def test_dev_rows_are_not_scored_where_nothing_validates(options, monkeypatch):
    from slzo.callbacks import loss_guard

    monkeypatch.setattr(loss_guard, "score_rows", None)
    assert main(["fit", *options, "--trainer.limit_val_batches=0", "--trainer.max_steps=2"]) == 0
    assert main(["fit", *options, "--guard.factor=null", "--trainer.max_steps=2"]) == 0


def test_a_scheduler_goes_on_from_half_the_rate(options, capsys):
    """LinearLR from 1 to 1/2 over 8 steps: it ends at half of what is left of the rate."""
    linear = [
        "--model.lr_scheduler=LinearLR",
        "--model.lr_scheduler.start_factor=1",
        "--model.lr_scheduler.total_iters=8",
    ]
    assert main(["fit", *options, *JUMPS, *linear, "--model.lr_scheduler.end_factor=0.5"]) == 0
    times = len(told(capsys.readouterr().out))
    assert times >= 1
    assert summary()["lr_at_end"] == pytest.approx(0.5 * 0.1 / 2**times)


SCHEDULERS = {
    "constant": lambda o: lr_scheduler.ConstantLR(o, factor=1.0),
    "lambda": lambda o: lr_scheduler.LambdaLR(o, lambda step: 1 / (1 + step)),
    "multiplicative": lambda o: lr_scheduler.MultiplicativeLR(o, lambda step: 0.9),
    "step": lambda o: lr_scheduler.StepLR(o, 3),
    "linear": lambda o: lr_scheduler.LinearLR(o, total_iters=8),
    "polynomial": lambda o: lr_scheduler.PolynomialLR(o, total_iters=20),
    "exponential": lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    "cosine": lambda o: lr_scheduler.CosineAnnealingLR(o, 20),
    "warm restarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4),
    "cyclic": lambda o: lr_scheduler.CyclicLR(o, 1e-3, 1e-1, step_size_up=4, cycle_momentum=False),
    "one cycle": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=20, cycle_momentum=False),
    "in turn": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.LinearLR(o, total_iters=3), lr_scheduler.CosineAnnealingLR(o, 9)], [6]
    ),
    "chained": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.ExponentialLR(o, 0.9), lr_scheduler.LinearLR(o, total_iters=9)]
    ),
}


@pytest.mark.parametrize("name", SCHEDULERS)
def test_all_later_rates_of_every_scheduler_are_halved(name):
    rates = []
    for halves in (False, True):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)
        scheduler = SCHEDULERS[name](optimizer)
        for step in range(12):
            optimizer.step()
            scheduler.step()
            if halves and step == 3:
                halve_rate(optimizer, [scheduler])
            rates.append(optimizer.param_groups[0]["lr"])
    plain, halved = rates[:12], rates[12:]
    assert halved[:3] == plain[:3]
    assert halved[3:] == pytest.approx([rate / 2 for rate in plain[3:]], rel=1e-6)


def test_without_a_copy_only_the_rate_is_halved(options, monkeypatch, capsys):
    from slzo.zo import tuned

    monkeypatch.setattr(tuned.TunedTensors.__init__, "__defaults__", (None, 0))
    assert main(["fit", *options, *JUMPS, "--trainer.max_steps=2"]) == 0
    output = capsys.readouterr().out
    assert "learning rate halved (time 1)." in output
    assert summary()["lr_at_end"] == pytest.approx(0.05)
    assert kept(last())[1]["good"] is None


def test_a_guard_forgets_the_run_before(options):
    """One callback in two fits of one process."""
    guard = LossGuard()
    guard.load_state_dict({"times": 3, "lowest": 1e-9, "good": None, "good_step": 7})
    from slzo.cli import build

    cli = build(
        [*options, "--trainer.logger=false", "--trainer.enable_checkpointing=false", "--model.layer=1"], run=False
    )
    cli.trainer.callbacks = [guard]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert guard.times == 0
    assert 1e-9 < guard.state_dict()["lowest"] < math.inf
