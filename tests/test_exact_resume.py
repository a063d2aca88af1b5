"""A resumed run ends with the same bytes as an uninterrupted one: any scope, any estimator, after any number of epochs.

The prefix cache is on: which rows' states it keeps, and with which others each is computed, must not depend on the stop.
"""

import os
import signal
import subprocess
import sys
from itertools import product
from pathlib import Path

import pytest
from helpers import error_line, last_checkpoint, round_by_batch, same_tensors, tuned

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint

pytestmark = pytest.mark.usefixtures("listening")
# batches of 8 of 40 rows: an epoch is 5 steps
STEPS = 13
SCOPES = {
    "LayerScope": [],
    "mlp": ["--model.scope=LayerScope", "--model.scope.part=mlp"],
    "OutlierChannels": ["--model.scope=OutlierChannels", "--model.scope.percent=20"],
    "ActivationSubspace": ["--model.scope=ActivationSubspace", "--model.scope.rank=4"],
    "LoRA": ["--model.scope=LoRA", "--model.scope.rank=2"],
    "PrefixTuning": ["--model.scope=PrefixTuning"],
    "AllParameters": ["--model.scope=AllParameters"],
    "RandomLayers": ["--model.scope=RandomLayers"],
    "SmallestWeights": ["--model.scope=SmallestWeights"],
}
ESTIMATORS = {
    "SPSA": [],
    "two queries": ["--model.num_queries=2"],
    "OneSided": ["--model.estimator=OneSided", "--model.num_queries=2"],
    "FZOO": ["--model.estimator=FZOO", "--model.num_queries=3"],
    "LOZO": ["--model.estimator=LOZO"],
    "EvolutionStrategy": ["--model.estimator=EvolutionStrategy", "--model.num_queries=3"],
    "Adam": ["--model.optimizer=Adam", "--model.optimizer.lr=1e-3"],
    "Backprop": ["--model.estimator=Backprop"],
    "LayerOutputPerturbation": [
        "--model.estimator=LayerOutputPerturbation",
        "--model.eps=auto",
        "--model.optimizer=AdamW",
    ],
}
EPOCHS = {"epoch 1": 3, "epoch 3": 11}
STOPS = ("max_steps", "SIGINT", "SIGTERM", "SIGKILL")
# directions of low rank where no matrix is tuned
REFUSED = [("OutlierChannels", "LOZO"), ("SmallestWeights", "LOZO")]
REFUSED += [
    (scope, "LayerOutputPerturbation")  # not one layer
    for scope in ("PrefixTuning", "AllParameters", "RandomLayers", "SmallestWeights")
]
ALL = [case for case in product(SCOPES, ESTIMATORS, EPOCHS, STOPS) if case[:2] not in REFUSED]
FIRST = ("LayerScope", "SPSA", "epoch 3", "SIGINT")
USUAL = {FIRST, ("LoRA", "LayerOutputPerturbation", "epoch 3", "SIGTERM")}


def mark(case):
    """None of the usual ones, slow where one of scope, estimator, epoch and stop is not the first's, else exhaustive."""
    if case in USUAL:
        return []
    differ = sum(a != b for a, b in zip(case, FIRST, strict=True))
    return pytest.mark.slow if differ <= 1 else pytest.mark.exhaustive


# room for 24 of the 56 rows or so
SMALL_CACHE = "--model.engine.cache_gb=1e-4"


@pytest.fixture(autouse=True)
def rounding(monkeypatch, request):
    if "SIGKILL" not in request.node.name:  # that run is a process of its own
        round_by_batch(monkeypatch)


@pytest.fixture
def fit(options):
    """The command that is stopped and resumed."""
    usual = [f"--trainer.max_steps={STEPS}", "--trainer.val_check_interval=5", "--record.test_before=false"]
    usual += ["--trainer.enable_progress_bar=false", "--data.eval_batch_size=4", "--model.layer=2"]
    return ["fit", *options, *usual]


def stopped(fit, step, how):
    """Run until a step."""
    if how == "max_steps":
        assert main([*fit, f"--trainer.max_steps={step}"]) == 0
        return
    sender = ["--trainer.callbacks=signal_sender.SignalSender", "--trainer.callbacks.place=on_train_batch_end"]
    command = [*fit, *sender, f"--trainer.callbacks.step={step}", f"--trainer.callbacks.number={how}"]
    if how != "SIGKILL":
        assert main(command) == 128 + getattr(signal, how)
        return
    command += ["--last_checkpoint.every_n_steps=1"]
    paths = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
    ended = subprocess.run([sys.executable, "-m", "slzo", *command], env={**os.environ, "PYTHONPATH": paths})
    assert ended.returncode == -signal.SIGKILL


def whole(fit):
    """The tuned tensors of an uninterrupted run."""
    assert main(fit) == 0
    return tuned(last_checkpoint())


def assert_resume_is_exact(fit, step, how, expected):
    before = len(list(Path("runs").glob("*")))
    stopped(fit, step, how)
    assert main([*fit, "--ckpt_path=last"]) == 0
    found = tuned(last_checkpoint(before + 1))
    assert same_tensors(expected, found)


@pytest.fixture(scope="module")
def known():
    """The tuned tensors of uninterrupted runs, by scope and estimator."""
    return {}


@pytest.mark.parametrize(
    ("scope", "estimator", "epoch", "how"), [pytest.param(*case, marks=mark(case)) for case in ALL]
)
def test_a_resume_is_exact(fit, known, scope, estimator, epoch, how):
    fit = [*fit, *SCOPES[scope], *ESTIMATORS[estimator]]
    kind = (scope, estimator, how == "SIGKILL")  # that one rounds as the model does
    if kind not in known:
        known[kind] = whole(fit)
    assert_resume_is_exact(fit, EPOCHS[epoch], how, known[kind])


@pytest.mark.parametrize(("scope", "estimator"), REFUSED)
def test_the_combinations_left_out_are_refused(fit, capsys, scope, estimator):
    assert f"model.estimator {estimator}: " in error_line(capsys, *fit, *SCOPES[scope], *ESTIMATORS[estimator])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_resume_is_exact_where_some_rows_are_kept(fit, dtype):
    fit = [*fit, SMALL_CACHE, f"--model.dtype={dtype}"]
    assert_resume_is_exact(fit, 11, "SIGINT", whole(fit))


@pytest.mark.slow
def test_kept_on_disk_or_in_memory_is_the_same(fit, tmp_path):
    assert main([*fit, SMALL_CACHE]) == 0
    assert main([*fit, SMALL_CACHE, f"--model.engine.cache_dir={tmp_path / 'states'}"]) == 0
    one, other = (tuned(last_checkpoint(number)) for number in (0, 1))
    assert same_tensors(one, other)


@pytest.mark.parametrize("monitor", ["val/loss", pytest.param("train/loss", marks=pytest.mark.slow)])
def test_early_stopping_counts_the_epoch_at_whose_end_a_run_is_resumed(options, monitor):
    """The state is saved before the callback checks the metric at the end of the epoch, and so checked again."""
    stop = ["--trainer.callbacks=EarlyStopping", f"--trainer.callbacks.monitor={monitor}"]
    stop += ["--trainer.callbacks.patience=2", "--trainer.callbacks.min_delta=9"]  # no loss falls as much
    epochs = ["--trainer.max_steps=-1", "--trainer.val_check_interval=1.0", "--trainer.check_val_every_n_epoch=1"]
    fit = ["fit", *options, "--record.test_before=false", *epochs, *stop]
    ended = []
    for ways in (
        [[]],
        [["--trainer.max_epochs=1"], ["--ckpt_path=last"]],
        [["--trainer.max_epochs=2"], ["--ckpt_path=last"]],
    ):
        for way in ways:
            assert main([*fit, "--trainer.max_epochs=6", *way]) == 0
        state = read_checkpoint(last_checkpoint(len(list(Path("runs").glob("*"))) - 1)).content
        (counts,) = (each for name, each in state["callbacks"].items() if name.startswith("EarlyStopping"))
        ended.append((state["global_step"], counts["wait_count"], float(counts["best_score"])))
    assert ended[0] == ended[1] == ended[2]
    assert ended[0][0] == 15
