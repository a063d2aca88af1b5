"""Several processes and a signal: all stop at the same place, and any number of them goes on."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import run_dir, tuned

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.checkpoints.step_log import read_step_log

ROWS = 12  # of a step, over all processes


@pytest.fixture
def fit(options):
    """Options of a run of three epochs of three steps."""
    usual = [
        "--trainer.max_steps=9",
        "--trainer.val_check_interval=4",
        "--summary.test_before=false",
        "--model.layer=2",
    ]
    return ["fit", *options, *usual, "--trainer.enable_progress_bar=false", "--data.eval_batch_size=4"]


def on(processes, fit, rows=None, **sent):
    """Exit status and output of a run on some processes, which may get a signal at some place."""
    more = [f"--data.batch_size={ROWS // processes if rows is None else rows}"]
    if processes > 1:
        more += [f"--trainer.devices={processes}", "--trainer.strategy=ddp"]
    if sent:
        more.append("--trainer.callbacks=signal_sender.SignalSender")
        more += [f"--trainer.callbacks.{name}={value}" for name, value in sent.items()]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-m", "slzo", *fit, *more],
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=240,
        # a job in the background of a shell ignores the signal otherwise
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    return done.returncode, done.stdout + done.stderr


def checkpoint(number):
    return read_checkpoint(run_dir(number) / "checkpoints" / "last.ckpt").content


def test_a_signal_to_one_of_two_stops_both_and_one_process_goes_on(fit):
    status, output = on(2, fit, place="on_train_batch_end", step=5, number="SIGTERM", rank=1)
    assert status == 143, output[-2000:]
    assert "Traceback" not in output
    assert checkpoint(0)["global_step"] == 5
    alone = [*fit, f"--data.batch_size={ROWS}"]
    assert main([*alone, "--ckpt_path=last"]) == 0
    assert main(alone) == 0
    resumed, whole = (tuned(run_dir(number) / "checkpoints" / "last.ckpt") for number in (1, 2))
    for name, tensor in whole.items():
        torch.testing.assert_close(resumed[name], tensor, rtol=1e-4, atol=1e-5)


POPULATION = [
    "--data.processes_divide=points",
    "--model.estimator=EvolutionStrategy",
    "--model.num_queries=3",
    "--model.eps=1e-2",
]


def test_a_population_over_two_processes_is_that_of_one(fit):
    """Six members on the same rows; the log of losses makes the same weights again on one process, bit by bit."""
    fit = [*fit, f"--data.batch_size={ROWS}", *POPULATION, "--trainer.max_steps=6"]
    status, output = on(2, fit, rows=ROWS)
    assert status == 0, output[-2000:]
    assert main(fit) == 0
    divided, whole = (tuned(run_dir(number) / "checkpoints" / "last.ckpt") for number in (0, 1))
    for name, tensor in whole.items():
        torch.testing.assert_close(divided[name], tensor, rtol=1e-4, atol=1e-5)
    logs = [read_step_log(run_dir(number) / "zo_log").steps for number in (0, 1)]
    assert list(logs[0]) == list(logs[1]) == list(range(6))
    for step, record in logs[1].items():
        assert logs[0][step].losses == pytest.approx(record.losses, rel=1e-4)
    assert main(["replay", "--run=runs/version_0", "--output=again.ckpt"]) == 0
    again = tuned("again.ckpt")
    assert all(torch.equal(again[name], tensor) for name, tensor in divided.items())


@pytest.mark.slow
@pytest.mark.parametrize(
    "sent",
    [
        {"place": "on_validation_batch_start", "step": 4, "number": "SIGTERM"},
        {"place": "on_validation_batch_start", "step": 8, "number": "SIGINT", "rank": 0},
        {"place": "on_before_optimizer_step", "step": 2, "number": "SIGTERM"},
        {"place": "on_train_batch_end", "step": 6, "number": "SIGINT"},
    ],
    ids=lambda sent: f"{sent['number']} {sent['place']}",
)
def test_a_resume_on_as_many_is_exact_and_on_others_close(fit, sent):
    assert on(2, fit)[0] == 0
    whole = tuned(run_dir(0) / "checkpoints" / "last.ckpt")
    status, output = on(2, fit, **sent)
    assert status == 128 + getattr(signal, sent["number"]), output[-2000:]
    assert on(2, [*fit, "--ckpt_path=runs/version_1/checkpoints/last.ckpt"])[0] == 0
    resumed = tuned(run_dir(2) / "checkpoints" / "last.ckpt")
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    for number, processes in ((3, 1), (4, 3)):
        status, output = on(processes, [*fit, "--ckpt_path=runs/version_1/checkpoints/last.ckpt"])
        assert status == 0, output[-2000:]
        other = tuned(run_dir(number) / "checkpoints" / "last.ckpt")
        for name, tensor in whole.items():
            torch.testing.assert_close(other[name], tensor, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_second_signal_to_one_of_two_ends_both_at_once(fit):
    status, output = on(2, fit, place="on_before_optimizer_step", step=6, number="SIGTERM", times=2, rank=0)
    assert status == 143, output[-2000:]
    assert checkpoint(0)["global_step"] == 4
