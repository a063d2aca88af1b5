"""The guard rolls a run back when the dev loss spikes."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import last_checkpoint, logged, run_fit, same_tensors, summary, tuned
from torch import nn
from torch.optim import lr_scheduler
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.callbacks.loss_guard import LossGuard
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.cli.app import SlzoCLI
from slzo.commands.registry import COMMANDS
from slzo.datamodule import TaskDataModule
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.lightning.trainer_state import num_dev_rows
from slzo.zo import auto_step
from slzo.zo.schedules import halve_rate
from slzo.zo.tuned import TunedTensors

SPIKES = [
    "--model.optimizer.lr=0.1",
    "--trainer.enable_progress_bar=false",
    "--model.scope=AllParameters",
    "--guard.factor=1.2",
]


def state_of(number=0):
    """The last checkpoint of a run, and the guard's state in it."""
    content = read_checkpoint(last_checkpoint(number)).content
    return content, next(state for name, state in content["callbacks"].items() if "LossGuard" in name)


def rollbacks(output):
    """Loss, lowest loss and step of each rollback."""
    pattern = (
        r"rose to (\S+), over 1.2 times its lowest, (\S+): learning rate halved, weights rolled back to step (\d+)"
    )
    return [(float(loss), float(lowest), int(step)) for loss, lowest, step in re.findall(pattern, output)]


def test_a_spike_rolls_back_and_halves_the_rate(options, capsys):
    assert main(["fit", *options, *SPIKES]) == 0
    output, found = capsys.readouterr().out, summary()
    times = rollbacks(output)
    assert 1 <= len(times) == found["rollbacks"]
    assert f"Rollback   {'once,' if len(times) == 1 else f'{len(times)} times'}" in output
    assert all(not loss <= 1.2 * lowest for loss, lowest, _ in times)
    assert found["lr_at_end"] == pytest.approx(0.1 / 2 ** len(times))
    content, state = state_of()
    assert state["rollbacks"] == len(times)
    # the best weights, those before training where no validation was better
    assert state["lowest"] == pytest.approx(min(times[0][1], *(v["loss"] for v in found["validations"])), rel=1e-3)
    if not found["validations"][-1]["loss"] <= 1.2 * state["lowest"]:  # rolled back at the end
        assert all(torch.equal(content["state_dict"][name], good) for name, good in state["good"]["masters"].items())


def test_the_weights_are_those_of_the_step_that_it_names(options, model_dir, capsys):
    """And momentum is forgotten: the next step would follow it, however small its own rate."""
    assert main(["fit", *options, *SPIKES, "--model.optimizer.momentum=0.9", "--trainer.max_steps=2"]) == 0
    ((_, _, step),) = rollbacks(capsys.readouterr().out)
    assert step == 0
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    assert all(torch.equal(before[name], tensor) for name, tensor in tuned(last_checkpoint()).items())
    assert not state_of()[0]["optimizer_states"][0]["state"]


def test_a_measured_rate_is_halved_too(options, monkeypatch, capsys):
    monkeypatch.setattr(auto_step, "_SHARE", 30.0)
    given = [option for option in options if not option.startswith("--model.optimizer")]
    assert main(["fit", *given, *SPIKES[1:], "--trainer.max_steps=4"]) == 0
    times = len(rollbacks(capsys.readouterr().out))
    assert times >= 1
    assert state_of()[0]["slzo"]["auto_step"]["factor"] == 0.5**times


@pytest.mark.parametrize(
    ("best", "rows", "factor"),
    [(None, 25, "1.14"), pytest.param(None, 4, "1.35", marks=pytest.mark.slow), (1.0, 25, "1.4")],
)
def test_left_out_the_factor_depends_on_the_number_of_dev_rows(options, monkeypatch, capsys, best, rows, factor):
    found = iter([2.0, *[9.0] * 9])
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": next(found))
    if best is not None:
        monkeypatch.setattr(TaskDataModule, "selection_metric", SelectionMetric("loss", "accuracy", best))
    given = [option for option in options if "num_dev" not in option]
    steps = ["--model.layer=1", "--trainer.max_steps=2", "--record.test_before=false"]
    assert main(["fit", *given, *steps, f"--data.num_dev={rows}"]) == 0
    assert f"rose to 9, over {factor} times its lowest, 2" in capsys.readouterr().out


def test_losses_that_are_not_finite_roll_back_too(options):
    assert main(["fit", *options, "--model.layer=1", "--model.optimizer.lr=1e38"]) == 0
    found, (_, state) = summary(), state_of()
    assert found["rollbacks"] == 4
    assert found["skipped_steps"] > 0
    assert state["lowest"] < math.inf
    assert found["score_after"] == found["score_before"]


def test_a_resumed_run_goes_on_as_it_would_have(options):
    options = [*options, *SPIKES, "--trainer.max_steps=6"]
    assert main(["fit", *options]) == 0
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    (whole, first), (resumed, second) = state_of(0), state_of(2)
    assert first["rollbacks"] >= 1
    assert {k: v for k, v in first.items() if k != "good"} == {k: v for k, v in second.items() if k != "good"}
    one, other = first["good"].pop("masters"), second["good"].pop("masters")
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert first["good"] == second["good"]
    assert all(torch.equal(whole["state_dict"][name], resumed["state_dict"][name]) for name in whole["state_dict"])
    assert summary(0)["rollbacks"] == summary(2)["rollbacks"]
    assert summary(0)["lr_at_end"] == summary(2)["lr_at_end"]


def test_weights_that_were_rolled_back_are_not_saved_as_the_best(options, capsys):
    """The score of the validation is that of the weights before the rollback."""
    fit = [*options, *SPIKES, "--trainer.max_steps=2", "--trainer.val_check_interval=2", "--guard.factor=1.001"]
    assert main(["fit", *fit]) == 0
    assert summary()["rollbacks"] == 1
    assert summary()["best_checkpoint"] is None
    assert summary()["score_after"] == summary()["score_before"]
    assert main(["export", "--ckpt_path=best", "--output=tuned"]) == 2
    assert "has no best one: it was not validated, all validations led to rollbacks" in capsys.readouterr().err


def test_null_never_rolls_back(options, capsys):
    assert main(["fit", *options, *SPIKES, "--guard.factor=null", "--trainer.max_steps=2"]) == 0
    assert not rollbacks(capsys.readouterr().out)
    assert (summary()["rollbacks"], summary()["lr_at_end"]) == (0, 0.1)
    assert state_of()[1]["good"] is None


def test_a_calm_run_is_left_alone(options, once):
    once(run_fit, *options, "--trainer.max_steps=4")
    content, state = state_of()
    assert (state["rollbacks"], summary()["rollbacks"], summary()["lr_at_end"]) == (0, 0, 1e-3)
    assert content["optimizer_states"]


@pytest.mark.slow
def test_dev_rows_are_not_scored_where_nothing_validates(options, monkeypatch):
    monkeypatch.setattr(TaskDataModule, "score", None)
    assert main(["fit", *options, "--trainer.limit_val_batches=0", "--trainer.max_steps=2"]) == 0
    assert main(["fit", *options, "--guard.factor=null", "--trainer.max_steps=2"]) == 0


OWN_OPTIMIZER = """
import torch


class Sums(torch.optim.Optimizer):
    # the state is filled in the constructor, as in torch's Adagrad up to 2.11
    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["sum"] = torch.full_like(param, 1e-10)

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                total = self.state[param]["sum"].addcmul_(param.grad, param.grad)
                param.addcdiv_(param.grad, total.sqrt(), value=-group["lr"])
"""


def test_a_state_from_the_constructor_is_reset(options, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(str(tmp_path))
    (tmp_path / "own_sums.py").write_text(OWN_OPTIMIZER)
    fit = ["fit", *options, *SPIKES, "--model.optimizer=own_sums.Sums", "--model.optimizer.lr=0.05"]
    assert main(fit) == 0
    times = len(rollbacks(capsys.readouterr().out))
    assert times >= 1
    assert main(["replay", "--config=runs/version_0/config.yaml", "--run=runs/version_0", "--output=again.ckpt"]) == 0
    assert same_tensors(tuned("again.ckpt"), tuned(last_checkpoint()))


def test_a_scheduler_goes_on_from_half_the_rate(options, capsys):
    """LinearLR from 1 to 1/2 over 8 steps: it ends at half of what is left of the rate."""
    linear = {"start_factor": 1, "end_factor": 0.5, "total_iters": 8}
    scheduler = ["--model.lr_scheduler=LinearLR", *(f"--model.lr_scheduler.{k}={v}" for k, v in linear.items())]
    assert main(["fit", *options, *SPIKES, *scheduler]) == 0
    times = len(rollbacks(capsys.readouterr().out))
    assert times >= 1
    assert summary()["lr_at_end"] == pytest.approx(0.5 * 0.1 / 2**times)


def test_the_logged_rate_is_that_of_the_step(options):
    more = ["--model.lr_scheduler=ExponentialLR", "--model.lr_scheduler.gamma=0.5", "--trainer.max_steps=3"]
    assert main(["fit", *options, *more, "--model.optimizer.lr=1e-3"]) == 0
    assert logged("train/lr") == pytest.approx([1e-3, 5e-4, 2.5e-4])


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
    "CosineAnnealingLR, eta_min": lambda o: lr_scheduler.CosineAnnealingLR(o, 10, eta_min=0.05),
    "CosineAnnealingWarmRestarts, eta_min": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, eta_min=0.05),
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
    monkeypatch.setattr(TunedTensors.__init__, "__defaults__", (None, 0))
    assert main(["fit", *options, *SPIKES, "--trainer.max_steps=2"]) == 0
    assert "learning rate halved (rollback 1)." in capsys.readouterr().out
    assert summary()["lr_at_end"] == pytest.approx(0.05)
    assert state_of()[1]["good"] is None


def test_a_guard_forgets_the_run_before(options):
    """One callback in two fits of one process."""
    guard = LossGuard()
    guard.load_state_dict({"rollbacks": 3, "first": 2.0, "lowest": 1e-9, "good": None})
    more = ["--trainer.logger=false", "--trainer.enable_checkpointing=false", "--model.layer=1"]
    cli = SlzoCLI(COMMANDS["fit"], [*options, *more])
    cli.trainer.callbacks = [guard]
    cli.trainer.fit(cli.model, datamodule=cli.datamodule)
    assert guard.rollbacks == 0
    assert 1e-9 < guard.state_dict()["lowest"] < math.inf


def test_of_equal_rewards_the_newest_weights_are_good(options, monkeypatch, capsys):
    found = iter([0.5, *[0.0] * 4, *[0.3] * 2, *[0.0] * 9])  # two callbacks ask for that of a validation
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": next(found))
    monkeypatch.setattr(TaskDataModule, "selection_metric", SelectionMetric("loss", "accuracy", 1.0))
    steps = ["--model.layer=1", "--trainer.max_steps=3", "--trainer.val_check_interval=1", "--guard.factor=1.5"]
    assert main(["fit", *options, *steps, "--record.test_before=false"]) == 0
    assert "rose to 0.3, over 1.5 times its lowest, 0: learning rate halved, weights rolled back to step 2" in (
        capsys.readouterr().out
    )


def test_rewards_above_the_largest_possible_one_are_reported_once(options, monkeypatch, capsys):
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": -5.0)
    monkeypatch.setattr(TaskDataModule, "selection_metric", SelectionMetric("loss", "accuracy", 1.0))
    steps = ["--model.layer=1", "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    assert main(["fit", *options, *steps, "--record.test_before=false"]) == 0
    assert capsys.readouterr().err.count("is 6, above the largest possible one, 1; set data.objective.best") == 1


def test_an_unknown_reward_is_no_spike(options, monkeypatch):
    """A reward function that failed at every dev row, such as a judge that timed out, says nothing about the weights."""
    found = iter([0.5, *[math.nan] * 9])
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": next(found))
    monkeypatch.setattr(TaskDataModule, "selection_metric", SelectionMetric("loss", "accuracy", 1.0))
    steps = ["--model.layer=1", "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    assert main(["fit", *options, *steps, "--record.test_before=false"]) == 0
    assert summary()["rollbacks"] == 0


def test_the_first_score_is_that_of_the_same_rows_as_the_others(options):
    """With weights that do not move, all scores of the same rows are equal."""
    still = ["--model.optimizer.lr=1e-12", "--guard.factor=1.0001", "--trainer.limit_val_batches=1"]
    assert main(["fit", *options, *still, "--data.eval_batch_size=2", "--trainer.enable_progress_bar=false"]) == 0
    assert summary()["rollbacks"] == 0


@pytest.mark.fast
@pytest.mark.parametrize(("limit", "number"), [(1.0, 10), (0.7, 8), (1, 4), (0, 0), (9, 10)])
def test_the_automatic_factor_counts_the_rows_that_are_scored(limit, number):
    rows = SimpleNamespace(eval_plan=lambda split: SimpleNamespace(batches=[[0] * 4, [0] * 4, [0] * 2]))
    assert num_dev_rows(SimpleNamespace(limit_val_batches=limit), rows) == number


def test_other_callbacks_save_the_weights_that_were_scored(options, capsys):
    """A run that continues from such a file rolls back first."""
    saver = {
        "monitor": "val/loss",
        "dirpath": "own",
        "save_top_k": -1,
        "filename": "{step}",
        "auto_insert_metric_name": False,
    }
    added = ["--trainer.callbacks=ModelCheckpoint", *(f"--trainer.callbacks.{k}={v}" for k, v in saver.items())]
    assert main(["fit", *options, *SPIKES, *added]) == 0
    spikes = {loss for loss, _, _ in rollbacks(capsys.readouterr().out)}
    losses = {each["step"]: each["loss"] for each in summary()["validations"]}
    assert sorted(losses) == sorted(int(file.stem) for file in Path("own").iterdir())
    (spike, *_) = (step for step, loss in losses.items() if float(f"{loss:.4g}") in spikes)
    assert main(["fit", *options, *SPIKES, f"--ckpt_path=own/{spike}.ckpt"]) == 0
    assert same_tensors(tuned(last_checkpoint(0)), tuned(last_checkpoint(1)))
    assert summary(0)["rollbacks"] == summary(1)["rollbacks"]
    for step in {spike, min(losses)}:
        capsys.readouterr()
        assert main(["validate", *options, f"--ckpt_path=own/{step}.ckpt"]) == 0
        (loss,) = re.findall(r"val/loss\W+([\d.]+)", capsys.readouterr().out)
        assert float(loss) == pytest.approx(losses[step], abs=1e-6)
