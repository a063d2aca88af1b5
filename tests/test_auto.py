"""lr auto and eps auto from the command line: spelling, training, checkpoints, two processes, errors."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from conftest import run_dir, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from test_cli import bad

from slzo.checkpoints import checkpoint_file
from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.cli_auto import spelled_out, with_words
from slzo.module import ZOModule
from slzo.zo.auto_step import AutoStep

LEARNS = [
    "--trainer.max_steps=60",
    "--trainer.val_check_interval=20",
    "--data.num_train=64",
    "--data.batch_size=64",  # all rows: with 16 and fewer queries rounding decided how it ended
    "--model.layer=2",
    "--model.num_queries=8",
    "--trainer.log_every_n_steps=1",
]


@pytest.fixture
def auto(options):
    """A run with nothing said of its step sizes."""
    given = ("--model.eps", "--model.optimizer", "--trainer.log_every_n_steps")
    return [*(option for option in options if not option.startswith(given)), "--trainer.enable_progress_bar=false"]


def summary(number=0):
    return json.loads((run_dir(number) / "summary.json").read_text())


def note(path):
    return read_checkpoint(path).content["slzo"]["step_size"]


def scalars(name, number=0):
    """What TensorBoard has of a training figure."""
    events = EventAccumulator(str(run_dir(number)))
    events.Reload()
    return [event.value for event in events.Scalars(f"train/{name}")]


def last(number=0):
    return run_dir(number) / "checkpoints" / "last.ckpt"


# ---- spelling --------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "left out": [],
    "option": ["--model.optimizer=SGD", "--model.optimizer.lr=auto"],
    "two words": ["--model.optimizer", "SGD", "--model.optimizer.lr", "auto"],
    "full name": ["--model.optimizer=SGD", "--model.optimizer.init_args.lr=auto"],
    "JSON": ['--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": "auto"}}'],
    "SGD in YAML": ["--config=mine.yaml"],
    "config as text": ['--config={"model": {"optimizer": {"class_path": "SGD", "init_args": {"lr": "auto"}}}}'],
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_config(auto, spelling, capsys):
    Path("mine.yaml").write_text("model:\n  optimizer:\n    class_path: torch.optim.SGD\n    init_args: {lr: auto}\n")
    with pytest.raises(SystemExit) as stop:
        main(["fit", *auto, *SPELLINGS[spelling], "--model.eps=auto", "--print_config"])
    assert stop.value.code == 0
    printed = yaml.safe_load(capsys.readouterr().out)["model"]
    assert printed["optimizer"]["class_path"] == "torch.optim.SGD"
    assert (printed["optimizer"]["init_args"]["lr"], printed["eps"]) == ("auto", "auto")


class SGD(torch.optim.Optimizer):
    """As packages have that are loaded by the way."""


@pytest.mark.parametrize("spelling", ["option", "two words", "SGD in YAML", "config as text", "bare"])
def test_another_package_may_have_an_optimizer_of_the_same_name(auto, spelling, capsys):
    Path("mine.yaml").write_text("model:\n  optimizer:\n    class_path: SGD\n    init_args: {lr: auto}\n")
    Path("bare.yaml").write_text("model:\n  optimizer: SGD\n")
    given = {**SPELLINGS, "bare": ["--config=bare.yaml", "--model.optimizer.lr=1e-3"]}[spelling]
    with pytest.raises(SystemExit) as stop:
        main(["fit", *auto, *given, "--print_config"])
    assert stop.value.code == 0, capsys.readouterr().err
    assert yaml.safe_load(capsys.readouterr().out)["model"]["optimizer"]["class_path"] == "torch.optim.SGD"


def test_a_long_config_as_text_is_no_file_name():
    text = json.dumps({"model": {"model": "x" * 300, "optimizer": {"class_path": "SGD", "init_args": {"lr": "auto"}}}})
    for args in ([f"--config={text}"], ["--config", text], ["-c", text]):
        found = spelled_out(args)[-1].removeprefix("--config=")
        assert yaml.safe_load(found)["model"]["optimizer"]["init_args"]["lr"] == math.inf


def test_what_is_not_an_optimizers_rate_stays():
    args = [
        "fit",
        "--data.task=auto",
        "--model.optimizer.momentum=auto",
        "--trainer.accelerator",
        "auto",
        "--config=no",
    ]
    assert spelled_out(args) == args
    assert with_words("a: {}\nlr: .inf\n  lr: .inf\nmax_lr: .inf\nlr: .infx\n") == (
        "a: {}\nlr: auto\n  lr: auto\nmax_lr: .inf\nlr: .infx\n"
    )


# ---- training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "optimizer",
    [
        ["--model.optimizer=SGD", "--model.optimizer.lr", "auto"],
        ["--config=adam.yaml"],
    ],
)
def test_a_run_with_measured_steps_learns_and_its_config_can_be_used_again(auto, optimizer, capsys):
    Path("adam.yaml").write_text("model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: auto}}}\n")
    assert main(["fit", *auto, *optimizer, *LEARNS]) == 0
    printed, found = capsys.readouterr(), summary()
    measured = re.search(r"Step size: eps (\S+), loss \S+, slopes \S+ .*, (\d+) evaluations", printed.err + printed.out)
    assert float(measured[1]) == found["eps"] > 0
    assert found["lr"] == "auto"
    assert 0 < found["lr_at_end"] < math.inf
    assert found["evaluations"] == 60 * 16 + int(measured[2])
    losses = [validation["loss"] for validation in found["validations"]]
    assert losses[-1] < 0.95 * math.log(2)  # it begins at about that
    config = yaml.safe_load((run_dir() / "config.yaml").read_text())["model"]
    assert (config["optimizer"]["init_args"]["lr"], config["eps"]) == ("auto", "auto")
    assert main(["fit", f"--config={run_dir() / 'config.yaml'}"]) == 0
    first, second = tuned(last(0)), tuned(last(1))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_logged_rate_follows_the_loss_and_its_slopes(auto):
    """The rates in TensorBoard are those of a plain recomputation from the logged losses and slopes."""
    assert main(["fit", *auto, "--trainer.log_every_n_steps=1", "--trainer.max_steps=6"]) == 0
    plus, minus, slopes, rates = map(scalars, ("loss_plus", "loss_minus", "projected_grad", "lr"))
    end = note(last())
    loss, square = end["loss"], end["square"]
    most = 0.3 / end["curvature"] if end["curvature"] > 0 else math.inf
    for step in range(5, -1, -1):  # the means are taken back step by step, from those of the checkpoint
        assert rates[step] == pytest.approx(min(0.045 * loss / square, most) / (1 + (step + 1) / 100), rel=1e-4)
        weight = 8 + step + 1
        loss = (weight * loss - (plus[step] + minus[step]) / 2) / (weight - 1)
        square = (weight * square - slopes[step] ** 2) / (weight - 1)
    assert end["weight"] == 14


def test_eps_alone_may_be_measured_and_lr_alone(auto):
    assert main(["fit", *auto, "--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--trainer.max_steps=2"]) == 0
    assert (summary()["lr"], summary()["lr_at_end"]) == (1e-3, 1e-3)
    assert note(last())["weight"] == 8  # nothing follows it
    assert main(["fit", *auto, "--model.eps=1e-2", "--trainer.max_steps=2"]) == 0
    assert (summary(1)["eps"], summary(1)["evaluations"]) == (1e-2, 17 + 4)
    assert main(["fit", *auto, "--model.eps=1e-2", "--model.optimizer=SGD", "--model.optimizer.lr=1e-3"]) == 0
    assert note(last(2)) is None


def test_the_step_is_measured_on_the_first_batch_of_the_run(auto, monkeypatch):
    rows = []
    original = ZOModule.loss_of

    def noting(self, batch, *args):
        rows.append(batch.packed.example_index)
        return original(self, batch, *args)

    monkeypatch.setattr(ZOModule, "loss_of", noting)
    assert main(["fit", *auto, "--trainer.max_steps=2", "--model.layer=1"]) == 0
    measured, first, second = rows
    assert measured == first != second


def test_eps_end_begins_at_the_measured_eps(auto):
    extra = ["--model.eps_end=1e-4", "--trainer.log_every_n_steps=1", "--trainer.max_steps=3"]
    assert main(["fit", *auto, *extra]) == 0
    first, middle, end = scalars("eps")
    assert first == pytest.approx(summary()["eps"])
    assert middle == pytest.approx(math.sqrt(first * end), rel=1e-4)
    assert end == pytest.approx(1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16"])
def test_a_half_precision_model_looks_further(auto, dtype):
    assert main(["fit", *auto, "--model.layer=1", "--trainer.max_steps=2"]) == 0
    assert main(["fit", *auto, "--model.layer=1", "--trainer.max_steps=2", f"--model.dtype={dtype}"]) == 0
    assert 1.5 < summary(1)["eps"] / summary(0)["eps"] < 6


def test_lr_search_begins_at_the_measured_rate(auto, capsys):
    assert main(["lr_search", *auto, "--steps=2", "--output=found"]) == 0
    content = json.loads(Path("found/lr_search.json").read_text())
    rates = [tried["lr"] for tried in content["tried"]]
    assert len(rates) == 7
    assert rates[3] == float(f"{rates[3]:.1g}")  # the measured one, rounded
    assert {tried["eps"] for tried in content["tried"]} == {content["tried"][0]["eps"]}
    assert content["settings"]["optimizer.lr"] == content["settings"]["eps"] == "auto"
    layer = content["settings"]["layer"]
    capsys.readouterr()
    assert main(["fit", *auto, f"--model.layer={layer}", "--trainer.max_steps=1"]) == 0
    found = summary(1)  # the search's profile is the first run
    assert found["eps"] == content["tried"][0]["eps"]
    assert 0.5 < rates[3] / found["lr_at_end"] < 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["SGD", pytest.param("Adam", marks=pytest.mark.slow)])
def test_a_resumed_run_equals_one_that_was_not_stopped(auto, optimizer, monkeypatch):
    auto = [*auto, f"--model.optimizer={optimizer}", "--model.optimizer.lr=auto", "--trainer.max_steps=9"]
    assert main(["fit", *auto]) == 0
    assert main(["fit", *auto, "--trainer.max_steps=3"]) == 0
    monkeypatch.setattr(AutoStep, "measure", None)  # measuring anew would fail
    assert main(["fit", *auto, "--ckpt_path=last"]) == 0
    whole, resumed = tuned(last(0)), tuned(last(2))
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert note(last(0)) == note(last(2)) != note(last(1))
    same = ("eps", "lr", "lr_at_end", "evaluations", "score_after", "steps")
    assert {name: summary(0)[name] for name in same} == {name: summary(2)[name] for name in same}


def test_a_checkpoint_that_knows_no_step_size_is_continued(auto):
    """Of a former version, or of a run with constant steps: it is measured where the weights are."""
    assert main(["fit", *auto, "--trainer.max_steps=3"]) == 0
    content = read_checkpoint(last()).content
    del content["slzo"]["step_size"]
    checkpoint_file.write(content, Path("former.ckpt"))
    assert main(["fit", *auto, "--ckpt_path=former.ckpt", "--trainer.max_steps=5"]) == 0
    found = note(last(1))
    assert found["weight"] == 8 + 2
    assert summary(1)["steps"] == 5
    assert 1 / 3 < found["square"] / note(last(0))["square"] < 3


def test_a_run_that_is_resumed_with_a_given_rate_says_so(auto, recwarn):
    assert main(["fit", *auto, "--trainer.max_steps=2"]) == 0
    given = ["--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--model.eps=1e-2"]
    assert main(["fit", *auto, *given, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    text = " ".join(str(warning.message) for warning in recwarn)
    assert "model.lr: auto -> 0.001" in text
    assert "model.eps: auto -> 0.01" in text
    assert summary(1)["eps"] == 1e-2


def test_two_processes_measure_the_same_and_hold_the_same_weights(auto):
    """Each on its share of the batch; together they measure what one process does on all of it."""
    code = (
        "import sys, torch; from slzo.__main__ import main; from slzo.callbacks import run_summary; "
        "original = run_summary.RunSummary.on_train_end\n"
        "def on_train_end(self, trainer, module):\n"
        "    weights = {k: v.clone() for k, v in module.state_dict().items()}\n"
        "    torch.save((weights, module.step_size.to_dict()), f'rank{trainer.global_rank}.pt')\n"
        "    original(self, trainer, module)\n"
        "run_summary.RunSummary.on_train_end = on_train_end\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    Path("two.py").write_text(code, encoding="utf-8")
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    command = [sys.executable, "two.py", "fit", *auto, "--trainer.max_steps=4"]
    done = subprocess.run([*command, *ranks], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, measured), (second, other) = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert measured == other
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert main(["fit", *auto, "--trainer.max_steps=4"]) == 0
    assert note(last(1)) == pytest.approx(measured, rel=1e-2)
    assert note(last(1))["eps"] == measured["eps"]


# ---- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.lr_scheduler=LinearLR"], r"model\.lr_scheduler: needs a number for model\.optimizer\.lr, which is auto"),
        (["--model.optimizer=Adagrad"], r"model\.optimizer\.lr auto: not known for Adagrad; give a number, or use one of SGD"),
        (["--model.optimizer=RMSprop", "--model.optimizer.lr=auto"], r"model\.optimizer\.lr auto: not known for RMSprop"),
        (["--model.eps=1e-12"], r"model\.eps 1e-12: no direction changes the loss of .*; give a larger one, or leave it out"),
        (["--model.eps=automatic"], r"model\.eps 'automatic': expected a number or auto"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_and_leaves_no_folder(auto, capsys, arguments, expected):
    assert re.search(expected, bad(capsys, "fit", *auto, *arguments))
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("value", "expected"),
    [(0.0, r"auto: the loss is 0, and a share of it needs one above 0"), (math.nan, r"auto: the loss is nan before")],
)
def test_a_loss_without_a_share_is_one_line_and_leaves_no_folder(auto, capsys, monkeypatch, value, expected):
    from slzo.zo.loss import BatchLogitLoss

    monkeypatch.setattr(BatchLogitLoss, "at", lambda self, points: torch.full((len(points),), value))
    assert re.search(expected, bad(capsys, "fit", *auto))
    assert not list(Path("runs").glob("*"))
