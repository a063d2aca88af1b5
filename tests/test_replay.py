"""The log of a run's steps rebuilds its weights, and brings back steps that a crash lost."""

import os
import re
import shutil
import signal
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import error_line, last_checkpoint, run_dir, run_fit, same_tensors, tuned
from lightning import Callback

from slzo import TaskDataModule, ZOModule, ZOTrainer
from slzo.__main__ import main
from slzo.checkpoints.step_log import Rollback, StepLog, StepLogWriter, StepRecord, read_step_log
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.experiments.replay import replay_run
from slzo.training import loss_log
from slzo.zo.estimators import SPSA
from slzo.zo.processes import Processes
from slzo.zo.stepper import Stepper

STEPS = 6
METHODS = {
    "SPSA": [],
    "bfloat16": ["--model.dtype=bfloat16"],
    "Adam, momentum of schedules": [
        "--model.optimizer=Adam",
        "--model.optimizer.lr=1e-3",
        "--model.lr_scheduler=torch.optim.lr_scheduler.OneCycleLR",
        "--model.lr_scheduler.max_lr=1e-2",
        f"--model.lr_scheduler.total_steps={STEPS}",
    ],
    "auto": ["--model.estimator=SPSA", "--model.optimizer.lr=auto"],
    "OneSided": ["--model.estimator=OneSided", "--model.num_queries=3"],
    "FZOO": ["--model.estimator=FZOO", "--model.num_queries=3"],
    "LOZO": ["--model.estimator=LOZO"],
    "EvolutionStrategy": [
        "--model.estimator=EvolutionStrategy",
        "--model.estimator.direction_rank=1",
        "--model.num_queries=3",
        "--model.engine.queries_at_once=2",
    ],
    "queries at once": ["--model.num_queries=3", "--model.engine.queries_at_once=2"],
    "LoRA": ["--model.scope=LoRA", "--model.scope.rank=2"],
    "PrefixTuning": ["--model.scope=PrefixTuning"],
    "ActivationSubspace": ["--model.scope=ActivationSubspace", "--model.scope.rank=4"],
    "RandomLayers": ["--model.scope=RandomLayers"],
    "SmallestWeights": ["--model.scope=SmallestWeights"],
}
USUAL = ("auto",)


@pytest.fixture
def fit(options):
    """A run that keeps a checkpoint of each validation, every second step."""
    usual = [f"--trainer.max_steps={STEPS}", "--record.test_before=false", "--trainer.enable_progress_bar=false"]
    return ["fit", *options, *usual, "--model.layer=2", "--checkpoint.save_top_k=-1"]


@pytest.fixture
def forward_passes(monkeypatch):
    """Steps that ran the model."""
    seen, loss = [], Stepper.loss

    def noted(self, batch, step=0, *more, **named):
        seen.append(step)
        return loss(self, batch, step, *more, **named)

    monkeypatch.setattr(Stepper, "loss", noted)
    return seen


def assert_same(path, other):
    one, two = tuned(path), tuned(other)
    assert one.keys() == two.keys()
    assert same_tensors(one, two)


@pytest.mark.parametrize("method", [pytest.param(m, marks=[] if m in USUAL else pytest.mark.slow) for m in METHODS])
def test_every_step_can_be_rebuilt_without_data(fit, method, forward_passes):
    assert main([*fit, *METHODS[method]]) == 0
    forward_passes.clear()
    for step in (4, STEPS):
        output = Path(f"{step}.ckpt")
        assert main(["replay", "--run=runs/version_0", f"--step={step}", f"--output={output}"]) == 0
        assert_same(output, run_dir() / "checkpoints" / f"step={step}.ckpt")
    assert not forward_passes
    assert main(["test", "--config=runs/version_0/config.yaml", "--ckpt_path=4.ckpt", "--data.num_test=4"]) == 0


@pytest.mark.parametrize("method", ["SPSA", *(pytest.param(m, marks=pytest.mark.slow) for m in ("auto", "LoRA"))])
def test_a_resume_takes_lost_steps_from_the_log(fit, method, forward_passes, capsys, once):
    fit = [*fit, *METHODS[method]]
    once(run_fit, *fit[1:])
    shutil.copytree(run_dir(0), run_dir(1))
    log = run_dir(1) / "zo_log"
    full = read_step_log(log)
    # a crash in the sixth step, the last checkpoint is of the second
    log.write_bytes(log.read_bytes()[:-3])
    forward_passes.clear()
    assert main([*fit, "--ckpt_path=runs/version_1/checkpoints/step=2.ckpt"]) == 0
    assert "Steps 2 to 4 are in the log" in capsys.readouterr().out
    assert forward_passes == [5]
    assert_same(last_checkpoint(0), last_checkpoint(2))
    assert read_step_log(run_dir(2) / "zo_log") == full
    assert main(["replay", "--run=runs/version_2", "--step=3", "--output=3.ckpt"]) == 0


def test_other_options_do_not_take_the_old_steps(fit, forward_passes, capsys, once):
    once(run_fit, *fit[1:])
    forward_passes.clear()
    ckpt = "--ckpt_path=runs/version_0/checkpoints/step=2.ckpt"
    assert main([*fit, "--model.eps=2e-3", ckpt]) == 0
    assert "warning: options that steps depend on have changed (model.eps: 0.001 -> 0.002); " in capsys.readouterr().err
    assert forward_passes == [2, 3, 4, 5]
    # a longer run with a constant rate is the same run
    forward_passes.clear()
    assert main([*fit, f"--trainer.max_steps={STEPS + 1}", ckpt]) == 0
    assert forward_passes == [STEPS]


def test_options_that_continue_from_the_checkpoint_keep_the_log(fit, forward_passes, capsys, once):
    once(run_fit, *fit[1:])
    forward_passes.clear()
    momentum = "--model.optimizer.momentum=0.5"
    assert main([*fit, momentum, "--ckpt_path=runs/version_0/checkpoints/step=2.ckpt"]) == 0
    assert "which continue from the checkpoint" in capsys.readouterr().err
    assert not forward_passes
    assert_same(last_checkpoint(0), last_checkpoint(1))
    replay = ["replay", "--run=runs/version_1", "--output=all.ckpt"]
    assert "(model.optimizer.momentum: 0.0 -> 0.5); give those of the log" in error_line(capsys, *replay)
    assert main([*replay, "--model.optimizer.momentum=0"]) == 0
    assert_same("all.ckpt", last_checkpoint(1))


def test_the_log_of_as_many_rows_per_step_is_used_on_any_number_of_processes(monkeypatch):
    monkeypatch.setattr(loss_log, "logged_options", lambda *_: {})
    model = SimpleNamespace(layer=2, parts=SimpleNamespace(model=torch.empty(0)))
    fingerprint = SimpleNamespace(hashes=lambda: {"train rows": "1"})
    prepared = SimpleNamespace(
        options=None, model=model, stepper=SimpleNamespace(seed=0), fingerprint=fingerprint, settings={}
    )

    def settings(batch_size, processes):
        data = SimpleNamespace(step_settings=lambda: {"data.batch_size": batch_size}, processes=processes)
        return loss_log.log_settings(prepared, data)

    assert settings(8, Processes()) == settings(4, Processes(2)) == settings(8, Processes(2, directions=2))
    assert settings(8, Processes()) != settings(8, Processes(2))


def test_a_run_with_a_rollback_is_rebuilt(fit, capsys):
    wild = ["--model.optimizer.lr=0.1", "--model.optimizer.momentum=0.5", "--model.scope=AllParameters"]
    assert main([*fit, *wild]) == 0
    assert read_step_log(run_dir() / "zo_log").rollbacks
    assert main(["replay", "--run=runs/version_0", "--output=all.ckpt"]) == 0
    assert_same("all.ckpt", last_checkpoint())
    assert "for test and predict, give --config runs/version_0/config.yaml too" in capsys.readouterr().out
    assert main(["test", "--ckpt_path=all.ckpt", "--config=runs/version_0/config.yaml"]) == 0


@pytest.mark.parametrize(
    "changed", ["--guard.factor=null", pytest.param("--trainer.val_check_interval=100", marks=pytest.mark.slow)]
)
def test_a_resume_repeats_no_step_after_a_rollback(fit, changed, forward_passes, capsys, monkeypatch):
    """Whether it comes again depends on options that may have changed."""
    # of the dev rows before training, and after steps 2 and 4, for the guard and the record
    found = iter([2.0, 1.9, 1.9, 9.0, 9.0, *[1.8] * 9])
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": next(found))
    assert main(fit) == 0
    assert read_step_log(run_dir() / "zo_log").rollbacks == {4: 2}
    forward_passes.clear()
    assert main([*fit, changed, "--ckpt_path=runs/version_0/checkpoints/step=2.ckpt"]) == 0
    assert "Steps 2 to 3 are in the log" in capsys.readouterr().out
    assert forward_passes == [4, 5]


def test_after_a_rollback_of_a_resumed_run_steps_are_taken_anew(fit, forward_passes, monkeypatch, once):
    """The run that it continues took the logged ones without this rollback."""
    once(run_fit, *fit[1:])
    forward_passes.clear()
    found = iter([9.0, 9.0, *[0.1] * 9])  # after steps 4 and 6, for the guard and the record
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": next(found))
    assert main([*fit, "--ckpt_path=runs/version_0/checkpoints/step=2.ckpt"]) == 0
    assert forward_passes == [4, 5]
    assert read_step_log(run_dir(1) / "zo_log").rollbacks == {4: 2}


def test_a_run_that_diverged_is_rebuilt(fit):
    assert main([*fit, "--model.optimizer.lr=1e30", "--model.max_nonfinite=2", "--guard.factor=null"]) == 2
    assert main(["replay", "--run=runs/version_0", "--output=diverged.ckpt"]) == 0
    assert max(float(tensor.abs().max()) for tensor in tuned("diverged.ckpt").values()) > 1e20


def test_a_module_that_is_tuned_further_is_replayed_too(model_dir, data_dir, tmp_path, monkeypatch):
    """Its first weights are not those of the base model."""
    monkeypatch.chdir(tmp_path)
    settings = {"layer": 2, "estimator": SPSA(), "eps": 1e-2, "optimizer": partial(torch.optim.SGD, lr=1e-2)}
    module = ZOModule(str(model_dir), seed=0, **settings)
    rows = partial(TaskDataModule, "sst2", data_dir=str(data_dir), num_train=16, num_dev=4, num_test=4, batch_size=4)
    for _ in range(2):
        trainer = ZOTrainer(max_steps=2, val_check_interval=2, accelerator="cpu", enable_progress_bar=False)
        trainer.fit(module, datamodule=rows())
    options = ZOModule(str(model_dir), seed=0, **settings).options
    for number in (0, 1):
        replay_run(options, rows(), str(run_dir(number)), None, None, torch.device("cpu"))
        assert_same(run_dir(number) / "checkpoints/replay-step=2.ckpt", last_checkpoint(number))


def test_a_rollback_restores_what_the_rate_follows(fit, monkeypatch):
    found = iter([2.0, 1.9, 1.9, 9.0, 9.0, *[1.8] * 9])
    monkeypatch.setattr(SelectionMetric, "distance", lambda self, values, prefix="": next(found))
    means = []
    roll_back = Stepper.rollback

    def observed(stepper, *args):
        roll_back(stepper, *args)
        means.append((args[0].means, stepper.rate.means))

    monkeypatch.setattr(Stepper, "rollback", observed)
    assert main([*fit, "--model.estimator=SPSA", "--model.optimizer.lr=auto", "--model.eps=auto"]) == 0
    ((kept, restored),) = means
    assert kept == restored
    assert kept["weight"] == 8 + 2  # those after step 2
    steps = read_step_log(run_dir() / "zo_log").steps
    assert 0.3 < steps[4].lr / steps[2].lr < 0.7
    assert main(["replay", "--run=runs/version_0", "--output=all.ckpt"]) == 0
    assert_same("all.ckpt", last_checkpoint())


def test_a_run_is_replayed_inside_its_folder(fit, monkeypatch, capsys, once):
    once(run_fit, *fit[1:])
    monkeypatch.chdir(run_dir())
    assert main(["replay", "--run=."]) == 0
    assert "for test and predict, give --config" not in capsys.readouterr().out
    assert_same("checkpoints/replay-step=6.ckpt", "checkpoints/step=6.ckpt")


def test_a_replay_keeps_the_checkpoints_of_the_run(fit, capsys, once):
    once(run_fit, *fit[1:])
    before = last_checkpoint().read_bytes()
    line = error_line(capsys, "replay", "--run=runs/version_0", f"--output={last_checkpoint()}")
    assert line.endswith("exists, and a replayed checkpoint cannot be continued; give another path")
    assert last_checkpoint().read_bytes() == before


def test_the_estimator_of_a_run_without_a_config_must_be_given(fit, capsys, once):
    once(run_fit, *fit[1:])
    (run_dir() / "config.yaml").unlink()  # as in a run from Python
    line = error_line(capsys, "replay", "--run=runs/version_0")
    assert re.search(
        r"these options and the run's log differ \(.*model\.estimator: SPSA -> LayerOutputPerturbation", line
    )


def test_differentiating_estimators_have_no_log(fit, capsys):
    assert main([*fit, "--model.estimator=Backprop", "--trainer.max_steps=2"]) == 0
    assert not (run_dir() / "zo_log").exists()
    assert "uses a derivative, so there is no log" in error_line(capsys, "replay", "--run=runs/version_0")
    (run_dir() / "config.yaml").unlink()  # as in a run from Python
    assert "uses a derivative, so there is no log" in error_line(capsys, "replay", "--run=runs/version_0")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--run=nowhere"], "run 'nowhere': no such folder"),
        (["--run="], "run '': no such folder"),
        (["--run=empty"], "run 'empty': not the folder of a run; give one such as runs/version_0"),
        (["--run=unlogged"], "its zo_log is missing"),
        (["--run=foreign"], "was not written by slzo"),
        (["--run=later"], "has format 3"),
        (["--run=short", "--step=9"], "step 9: the log of 'short' has 0 steps"),
    ],
)
def test_what_cannot_be_replayed_is_one_line(options, more, message, capsys):
    for name, text in (("empty", None), ("foreign", "x\n"), ("later", '{"format": 3, "settings": {}}\n')):
        Path(name).mkdir()
        if text is not None:
            (Path(name) / "zo_log").write_text(text)
    Path("unlogged").mkdir()
    Path("unlogged/config.yaml").write_text("seed_everything: 0")
    Path("short").mkdir()
    StepLogWriter(Path("short/zo_log"), StepLog({})).close()
    assert message in error_line(capsys, "replay", *options, *more)


def test_a_log_is_small_and_ends_where_a_crash_cut_it(tmp_path):
    path = tmp_path / "zo_log"
    records = [StepRecord(step, 1e-3, 1e-4, (0.5, 0.25)) for step in range(10_000)] + [Rollback(10_000, 7)]
    writer = StepLogWriter(path, StepLog({"a": 1}))
    for record in records:
        writer.append(record)
    writer.close()
    writer.close()
    assert path.stat().st_size < 1e6 / 2
    log = read_step_log(path)
    assert list(log.records) == records
    assert log.settings == {"a": 1}
    assert log.before(3) == records[:3]
    content = path.read_bytes()
    for end in (len(content) - 1, len(content) - 40):
        path.write_bytes(content[:end])
        assert len(read_step_log(path).records) == len(records) - (1 if end == len(content) - 1 else 2)
    path.write_bytes(content[:5000] + b"x" + content[5001:])
    assert 0 < len(read_step_log(path).records) < 5000 / 35


@pytest.mark.slow
def test_a_killed_run_loses_no_step_that_was_done(fit):
    assert main(fit) == 0
    sender = ["--trainer.callbacks=signal_sender.SignalSender", "--trainer.callbacks.place=on_train_batch_start"]
    sender += ["--trainer.callbacks.step=5", "--trainer.callbacks.number=SIGKILL"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run([sys.executable, "-m", "slzo", *fit, *sender], env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == -signal.SIGKILL
    assert list(read_step_log(run_dir(1) / "zo_log").steps) == list(range(5))
    assert main([*fit, "--ckpt_path=last"]) == 0
    assert_same(last_checkpoint(0), last_checkpoint(2))


def test_steps_whose_rate_a_callback_changed_are_not_rebuilt(sst2_options, model_dir, data_dir, capsys):
    class Doubles(Callback):
        def on_train_batch_start(self, trainer, *_):
            trainer.optimizers[0].param_groups[0]["lr"] *= 2

    module = ZOModule(str(model_dir), 1, None, SPSA(), 1e-3, optimizer=partial(torch.optim.SGD, lr=1e-3), seed=0)
    data = TaskDataModule("sst2", data_dir=str(data_dir), num_train=16, num_dev=8, num_test=8)
    ZOTrainer(max_steps=1, val_check_interval=1, callbacks=[Doubles()], accelerator="cpu").fit(module, datamodule=data)
    same = ["--model.layer=1", "--model.estimator=SPSA", "--model.eps=1e-3", "--model.optimizer=SGD"]
    command = ["replay", *sst2_options, *same, "--model.optimizer.lr=1e-3", f"--run={run_dir()}", "--step=1"]
    line = error_line(capsys, *command)
    assert "step 0 was taken with lr 0.002" in line
    assert "or a callback changed the rate; continue the run with the same callbacks" in line
