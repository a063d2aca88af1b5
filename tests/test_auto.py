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
from helpers import error_line, last_checkpoint, logged, same_tensors, summary, tuned
from jsonargparse import get_loader

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.cli.auto_values import decode_words, encode_words
from slzo.cli.given import one_word_each
from slzo.zo.auto_step import AutoStep
from slzo.zo.logit_loss import BatchLogitLoss
from slzo.zo.stepper import Stepper

LEARNS = [
    "--trainer.max_steps=60",
    "--trainer.val_check_interval=20",
    "--data.num_train=64",
    "--data.batch_size=64",  # all rows: with 16 and fewer queries rounding decided how it ended
    "--model.layer=2",
    "--model.num_queries=8",
]


@pytest.fixture
def auto(options):
    """A run along random directions with nothing said of its step sizes."""
    given = ("--model.eps", "--model.optimizer")
    rest = [option for option in options if not option.startswith(given)]
    return [*rest, "--model.estimator=SPSA", "--trainer.enable_progress_bar=false"]


def state(number=0):
    """The measured step size in a run's last checkpoint."""
    return read_checkpoint(last_checkpoint(number)).metadata["auto_step"]


# ---- spelling --------------------------------------------------------------------------------------------------------------

SPELLINGS = {
    "option": ["--model.optimizer=SGD", "--model.optimizer.lr=auto"],
    "two words": ["--model.optimizer", "SGD", "--model.optimizer.lr", "auto"],
    "full name": ["--model.optimizer=SGD", "--model.optimizer.init_args.lr=auto"],
    "JSON": ['--model.optimizer={"class_path": "torch.optim.SGD", "init_args": {"lr": "auto"}}'],
    "file": ["--config=mine.yaml"],
    "config as text": ['--config={"model": {"optimizer": {"class_path": "SGD", "init_args": {"lr": "auto"}}}}'],
}


class SGD(torch.optim.Optimizer):
    """Another optimizer of the same name, as other packages have; names of torch's optimizers are still torch's."""


def printed_model(capsys, *args):
    """The model's options in a printed config."""
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args, "--print_config"])
    printed = capsys.readouterr()
    assert stop.value.code == 0, printed.err
    return yaml.safe_load(printed.out)["model"]


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_is_the_same_config(auto, spelling, capsys):
    Path("mine.yaml").write_text("model:\n  optimizer:\n    class_path: SGD\n    init_args: {lr: auto}\n")
    printed = printed_model(capsys, *auto, *SPELLINGS[spelling], "--model.eps=auto")
    assert printed["optimizer"]["class_path"] == "torch.optim.SGD"
    assert (printed["optimizer"]["init_args"]["lr"], printed["eps"]) == ("auto", "auto")


def test_a_bare_name_in_a_file_takes_a_rate_from_the_command_line(auto, capsys):
    Path("bare.yaml").write_text("model:\n  optimizer: SGD\n")
    printed = printed_model(capsys, *auto, "--config=bare.yaml", "--model.optimizer.lr=1e-3")
    assert printed["optimizer"]["class_path"] == "torch.optim.SGD"
    assert printed["optimizer"]["init_args"]["lr"] == 1e-3


def test_a_file_that_a_config_names_may_have_the_rate(auto, capsys):
    """Its path, and those of the other files, are relative to the config's folder."""
    Path("own").mkdir()
    Path("own/all.yaml").write_text("model: model.yaml\ndata: data.yaml\n")
    Path("own/model.yaml").write_text("scope: scope.yaml\noptimizer: sgd.yaml\n")
    Path("own/sgd.yaml").write_text("class_path: SGD\ninit_args: {lr: auto}\n")
    Path("own/scope.yaml").write_text("class_path: LoRA\ninit_args: {rank: 3}\n")
    Path("own/data.yaml").write_text("batch_size: 3\n")
    for args in (["--config=own/all.yaml"], ["--model=own/model.yaml"], ["--model.optimizer", "own/sgd.yaml"]):
        printed = printed_model(capsys, *args)
        assert printed["optimizer"]["class_path"] == "torch.optim.SGD"
        assert printed["optimizer"]["init_args"]["lr"] == "auto"
        if "optimizer" not in args[0]:
            assert printed["scope"]["init_args"]["rank"] == 3


TEXTS = ["12e5", "1e-3", "-1.5E3", "2020-01-01", "1.5", "true", "{text}"]


@pytest.mark.usefixtures("own_folder")
def test_the_other_options_of_a_config_stay_as_they_are():
    """Texts stay texts for the parser, which reads more numbers than PyYAML, and numbers stay numbers."""
    sgd = "{class_path: SGD, init_args: {lr: auto}}"
    Path("quoted.yaml").write_text(
        f"model: {{optimizer: {sgd}, eps: 1e-3}}\ndata: {{labels: {TEXTS}, day: 2020-01-01}}\n"
    )
    (found,) = encode_words(["--config=quoted.yaml"])
    content = get_loader("yaml")(found.removeprefix("--config="))
    assert content["data"] == {"labels": TEXTS, "day": "2020-01-01"}
    assert content["model"]["eps"] == 1e-3
    assert content["model"]["optimizer"]["init_args"]["lr"] == math.inf


@pytest.mark.usefixtures("own_folder")
def test_a_config_that_is_written_has_the_texts_that_were_read(capsys):
    """The parser writes the arguments of a class and reads them again before it writes the whole config."""
    numbers = [1e-3, 12e5, 2, 1.5]
    arguments = {"prompt": "1e-3", "candidates": TEXTS, "labels": [*TEXTS, *numbers]}
    config = {"data": {"task": {"class_path": "TemplateTask", "init_args": arguments}, "hub_config": "12e5"}}
    Path("config.yaml").write_text(json.dumps(config))
    for _ in range(2):
        with pytest.raises(SystemExit):
            main(["fit", "--config=config.yaml", "--print_config"])
        Path("config.yaml").write_text(capsys.readouterr().out)
        found = get_loader("yaml")(Path("config.yaml").read_text())["data"]
        assert found["hub_config"] == "12e5"
        assert {name: found["task"]["init_args"][name] for name in arguments} == arguments


@pytest.mark.usefixtures("own_folder")
def test_a_config_of_another_lightning_cli_is_read():
    """It has options of optimizers at the top, which are null."""
    options = {
        "seed_everything": 0,
        "optimizer": None,
        "lr_scheduler": None,
        "model": {"layer": 1},
        "weights_only": None,
    }
    Path("config.yaml").write_text(yaml.dump(options))
    (found,) = encode_words(["--config=config.yaml"])
    assert yaml.safe_load(found.removeprefix("--config=")) == {"seed_everything": 0, "model": {"layer": 1}}
    given = {**options, "optimizer": {"class_path": "torch.optim.SGD"}}
    Path("config.yaml").write_text(yaml.dump(given))
    assert yaml.safe_load(encode_words(["--config=config.yaml"])[0].removeprefix("--config="))["optimizer"]


def test_a_long_config_as_text_is_no_file_name():
    text = json.dumps({"model": {"model": "x" * 300, "optimizer": {"class_path": "SGD", "init_args": {"lr": "auto"}}}})
    for args in ([f"--config={text}"], ["--config", text], ["-c", text]):
        (found,) = encode_words(one_word_each(args))
        found = found.removeprefix("--config=")
        assert yaml.safe_load(found)["model"]["optimizer"]["init_args"]["lr"] == math.inf


@pytest.mark.parametrize("prompt", ["Review 😀: {text}", "Q: {text}\nA:", "- {text}", "{text} It was", "Q: {text} A:"])
def test_a_prompt_of_the_command_line_is_a_text(prompt, capsys):
    task = ["--data.task=TemplateTask", '--data.task.candidates=[" a", " b"]', f"--data.task.prompt={prompt}"]
    with pytest.raises(SystemExit):
        main(["fit", *task, "--data.task.name=mine", "--print_config"])
    found = get_loader("yaml")(capsys.readouterr().out)["data"]["task"]["init_args"]
    assert (found["prompt"], found["candidates"], found["name"]) == (prompt, [" a", " b"], "mine")


def test_only_the_rate_of_an_optimizer_is_replaced():
    args = ["fit", "--data.task=auto", "--model.optimizer.momentum=auto", "--trainer.accelerator=auto", "--config=no"]
    assert encode_words(args) == args
    assert decode_words("a: {}\nlr: .inf\n  lr: .inf\nmax_lr: .inf\nlr: .infx\n") == (
        "a: {}\nlr: auto\n  lr: auto\nmax_lr: .inf\nlr: .infx\n"
    )


# ---- training --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("optimizer", "again"),
    [
        pytest.param(["--model.optimizer.lr", "auto"], False, marks=pytest.mark.slow, id="SGD"),
        pytest.param(["--config=adam.yaml"], True, marks=pytest.mark.slow, id="Adam"),
    ],
)
def test_a_run_with_measured_steps_learns_and_its_config_can_be_used_again(auto, optimizer, again, capsys):
    Path("adam.yaml").write_text("model: {optimizer: {class_path: torch.optim.Adam, init_args: {lr: auto}}}\n")
    assert main(["fit", *auto, *optimizer, *LEARNS]) == 0
    found = summary()
    measured = re.search(r"Step size: eps (\S+), .* (\d+) evaluations", capsys.readouterr().out)
    assert float(measured[1]) == found["eps"] > 0
    assert found["lr"] == "auto"
    assert 0 < found["lr_at_end"] < math.inf
    assert found["evaluations"] == 60 * 16 + int(measured[2])
    assert found["validations"][-1]["loss"] < 0.95 * math.log(2)  # it begins at about that
    config = Path("runs/version_0/config.yaml")
    model = yaml.safe_load(config.read_text())["model"]
    assert (model["optimizer"]["init_args"]["lr"], model["eps"]) == ("auto", "auto")
    if not again:
        return
    assert main(["fit", f"--config={config}"]) == 0
    first, second = tuned(last_checkpoint(0)), tuned(last_checkpoint(1))
    assert same_tensors(first, second)


def test_the_logged_rate_follows_the_loss_and_its_slopes(auto):
    """The logged rates are those of a plain recomputation from the logged losses and slopes."""
    assert main(["fit", *auto, "--trainer.max_steps=6"]) == 0
    plus, minus, slopes, rates = (
        logged(f"train/{name}") for name in ("loss_plus", "loss_minus", "projected_grad", "lr")
    )
    end = state()
    loss, square = end["loss"], end["square"]
    most = 0.3 / end["curvature"] if end["curvature"] > 0 else math.inf
    for step in range(5, -1, -1):  # the means are taken back step by step, from those of the checkpoint
        assert rates[step] == pytest.approx(min(0.045 * loss / square, most) / (1 + (step + 1) / 100), rel=1e-4)
        weight = 8 + step + 1
        loss = (weight * loss - (plus[step] + minus[step]) / 2) / (weight - 1)
        square = (weight * square - slopes[step] ** 2) / (weight - 1)
    assert end["weight"] == 14


@pytest.mark.slow
def test_eps_alone_may_be_measured_and_lr_alone(auto):
    rate = ["--model.optimizer=SGD", "--model.optimizer.lr=1e-3"]
    assert main(["fit", *auto, *rate, "--trainer.max_steps=2"]) == 0
    assert (summary()["lr"], summary()["lr_at_end"]) == (1e-3, 1e-3)
    assert state()["weight"] == 8  # the rate does not follow the steps
    assert main(["fit", *auto, "--model.eps=1e-2", "--trainer.max_steps=2"]) == 0
    assert (summary(1)["eps"], summary(1)["evaluations"]) == (1e-2, 17 + 4)
    assert main(["fit", *auto, "--model.eps=1e-2", *rate, "--trainer.max_steps=1"]) == 0
    assert state(2) is None


def test_the_step_is_measured_on_the_first_batch_of_the_run(auto, monkeypatch):
    rows, loss = [], Stepper.loss

    def noted(self, batch, step=0, *more, **named):
        rows.append(batch.packed.example_index)
        return loss(self, batch, step, *more, **named)

    monkeypatch.setattr(Stepper, "loss", noted)
    assert main(["fit", *auto, "--trainer.max_steps=2", "--model.layer=1"]) == 0
    measured, first, second = rows
    assert measured == first != second


def test_in_half_precision_the_eps_is_larger(auto):
    for number, dtype in enumerate(("float32", "bfloat16")):
        assert main(["fit", *auto, "--model.layer=1", "--trainer.max_steps=2", f"--model.dtype={dtype}"]) == 0, number
    assert 1.5 < summary(1)["eps"] / summary(0)["eps"] < 6


def test_rates_are_tried_around_the_measured_one(auto):
    assert main(["sweep", *auto, "--lrs=auto", "--steps=2", "--output=found"]) == 0
    content = json.loads(Path("found/rates.json").read_text())
    rates = [tried["lr"] for tried in content["tried"]]
    assert len(rates) == 7
    assert rates[3] == float(f"{rates[3]:.1g}")  # the measured one, rounded
    (eps,) = {tried["eps"] for tried in content["tried"]}
    settings = content["settings"]
    assert settings["model.optimizer.lr"] == settings["model.eps"] == "auto"
    assert main(["fit", *auto, f"--model.layer={settings['model.layer']}", "--trainer.max_steps=1"]) == 0
    found = summary()
    assert found["eps"] == eps
    assert 0.5 < rates[3] / found["lr_at_end"] < 2


# ---- checkpoints -----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["SGD", "Adam"])
def test_a_resumed_run_equals_one_that_was_not_stopped(auto, optimizer, monkeypatch):
    auto = [*auto, f"--model.optimizer={optimizer}", "--model.optimizer.lr=auto", "--trainer.max_steps=9"]
    assert main(["fit", *auto]) == 0
    assert main(["fit", *auto, "--trainer.max_steps=3"]) == 0
    monkeypatch.setattr(AutoStep, "measure", None)  # measuring again would fail
    assert main(["fit", *auto, "--ckpt_path=last"]) == 0
    whole, resumed = tuned(last_checkpoint(0)), tuned(last_checkpoint(2))
    assert same_tensors(whole, resumed)
    assert state(0) == state(2) != state(1)
    same = ("eps", "lr", "lr_at_end", "evaluations", "score_after", "steps")
    assert {name: summary(0)[name] for name in same} == {name: summary(2)[name] for name in same}


def test_a_run_with_given_steps_is_continued_with_measured_ones(auto):
    """They are measured where the weights are."""
    given = ["--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--model.eps=1e-3"]
    assert main(["fit", *auto, *given, "--trainer.max_steps=3"]) == 0
    assert main(["fit", *auto, "--ckpt_path=last", "--trainer.max_steps=5"]) == 0
    found, end = state(1), summary(1)
    assert (found["weight"], end["steps"]) == (8 + 2, 5)
    assert (end["eps"], end["evaluations"]) == (found["eps"], 2 * 5 + found["evaluations"])
    assert end["lr_at_end"] != 1e-3


def test_a_run_that_is_resumed_with_a_given_rate_says_so(auto, capsys):
    assert main(["fit", *auto, "--trainer.max_steps=2"]) == 0
    given = ["--model.optimizer=SGD", "--model.optimizer.lr=1e-3", "--model.eps=1e-2"]
    assert main(["fit", *auto, *given, "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert (
        "model.eps: auto -> 0.01; model.optimizer.lr: auto -> 0.001; the new values are used" in capsys.readouterr().err
    )
    assert (summary(1)["eps"], summary(1)["lr"]) == (1e-2, 1e-3)


def test_a_resumed_run_records_the_rate_that_it_continues_with(auto):
    given = ["--model.optimizer=SGD", "--model.eps=1e-2"]
    assert main(["fit", *auto, *given, "--model.optimizer.lr=1e-3", "--trainer.max_steps=2"]) == 0
    assert main(["fit", *auto, *given, "--model.optimizer.lr=5e-3", "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert (summary(1)["lr"], summary(1)["lr_at_end"]) == (1e-3, 1e-3)
    assert read_checkpoint(last_checkpoint(1)).metadata["settings"]["model.optimizer.lr"] == 1e-3


@pytest.mark.slow
def test_two_processes_measure_the_same_and_hold_the_same_weights(auto):
    """Each measures on its share of the batch; together they measure what one process does on all of it."""
    code = (
        "import sys, torch; from slzo.__main__ import main; from slzo.callbacks.run_record import RunRecord\n"
        "original = RunRecord.on_train_end\n"
        "def on_train_end(self, trainer, module):\n"
        "    weights = {k: v.clone() for k, v in module.state_dict().items()}\n"
        "    torch.save((weights, vars(module.stepper.auto)), f'rank{trainer.global_rank}.pt')\n"
        "    original(self, trainer, module)\n"
        "RunRecord.on_train_end = on_train_end\n"
        "sys.exit(main(sys.argv[1:]))"
    )
    Path("two.py").write_text(code, encoding="utf-8")
    ranks = ["--trainer.devices=2", "--trainer.strategy=ddp", "--data.batch_size=4"]
    command = [sys.executable, "two.py", "fit", *auto, "--trainer.max_steps=4"]
    done = subprocess.run([*command, *ranks], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    (first, measured), (second, other) = (torch.load(f"rank{rank}.pt", weights_only=True) for rank in (0, 1))
    assert measured == other
    assert same_tensors(first, second)
    assert main(["fit", *auto, "--trainer.max_steps=4"]) == 0
    assert state(1) == pytest.approx(measured, rel=1e-2)
    assert state(1)["eps"] == measured["eps"]


# ---- errors ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--model.lr_scheduler=LinearLR"], r"model\.lr_scheduler: needs a number for model\.optimizer\.lr, which is auto"),
        (["--model.optimizer=Adagrad"], r"model\.optimizer\.lr auto: no rate is known for Adagrad; give a number, or use one of"),
        (["--model.optimizer=RMSprop", "--model.optimizer.lr=auto"], r"model\.optimizer\.lr auto: no rate is known for RMSprop"),
        (["--model.eps=1e-12"], r"model\.eps 1e-12: rounding hides the effect of every direction on .*; give a larger value"),
        (["--model.eps=automatic"], r"model\.eps 'automatic': expected a number or auto"),
    ],
)  # fmt: skip
def test_what_cannot_be_measured_is_one_line_and_leaves_no_folder(auto, capsys, arguments, expected):
    assert re.search(expected, error_line(capsys, "fit", *auto, *arguments))
    assert not list(Path("runs").glob("*"))


@pytest.mark.parametrize(
    ("value", "expected"), [(0.0, "auto: the loss is 0, "), (math.nan, "auto: the loss is nan before")]
)
def test_a_loss_without_a_share_is_one_line_and_leaves_no_folder(auto, capsys, monkeypatch, value, expected):
    monkeypatch.setattr(BatchLogitLoss, "at", lambda self, points: torch.full((len(points),), value))
    assert expected in error_line(capsys, "fit", *auto)
    assert not list(Path("runs").glob("*"))
