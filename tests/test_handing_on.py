"""The best checkpoint of a run by name, and the commands in its summary."""

import re
import shlex
import shutil
from pathlib import Path

import pytest
from helpers import error_line, last_checkpoint, run_dir, run_fit, summary

from slzo.__main__ import main


def test_best_is_the_checkpoint_that_was_scored(options, capsys, monkeypatch):
    assert main(["fit", *options, "--checkpoint.monitor=val/accuracy", "--checkpoint.mode=max"]) == 0
    output = capsys.readouterr().out
    found = summary()
    best = found["best_checkpoint"]
    assert Path(best).name != "last.ckpt"
    assert [shlex.split(command)[:4] for command in found["use"]] == [
        ["slzo", name, "--ckpt_path", best] for name in ("test", "predict", "export", "generate")
    ]
    assert all(command in output for command in found["use"])
    assert main(["test", "--ckpt_path=best"]) == 0
    printed = capsys.readouterr().out
    assert f"Using the best checkpoint of the newest run, {best}" in printed
    score = float(re.search(r"test/accuracy\W+([\d.]+)", printed)[1])
    assert score == pytest.approx(found["score_after"], abs=5e-5)
    for command in found["use"][1:3]:
        assert main(shlex.split(command)[1:]) == 0
    assert Path("predictions.jsonl").is_file()
    with monkeypatch.context() as there:
        there.chdir(run_dir() / "checkpoints")
        assert main(["test", "--ckpt_path=last.ckpt", "--trainer.logger=false"]) == 0  # with the config of its run
    # moved, and without a file
    shutil.move("runs", "elsewhere")
    assert main(["export", "--ckpt_path=elsewhere/version_0", "--output=moved"]) == 0
    for path in Path("elsewhere").rglob("step=*.ckpt"):
        path.unlink()
    assert "ckpt_path 'best': the run of" in error_line(
        capsys, "test", "--ckpt_path=best", "--trainer.logger.save_dir=elsewhere"
    )


@pytest.mark.slow
def test_without_a_last_checkpoint_the_newest_of_the_same_run_is_last(options, capsys):
    for _ in range(2):
        assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    last_checkpoint(1).unlink()
    assert main(["replay", f"--run={run_dir(0)}", "--step=1"]) == 0  # newer, but it is no state of a run
    (whole,) = (run_dir(1) / "checkpoints").iterdir()
    assert main(["fit", *options, "--trainer.max_steps=6", "--ckpt_path=last"]) == 0
    printed = capsys.readouterr()
    assert "ckpt_path 'last': 'runs/version_1/checkpoints' has no last.ckpt" in printed.err + printed.out
    assert f"Using the last checkpoint of the newest run, {whole}" in printed.out
    assert summary(2)["steps"] == 6


def test_a_newer_run_without_a_checkpoint_is_named(options, capsys, once):
    once(run_fit, *options, "--trainer.max_steps=2")
    interrupted = run_dir(1)
    interrupted.mkdir()
    (interrupted / "environment.json").write_text("{}")
    assert main(["test", "--ckpt_path=last"]) == 0
    assert "'runs/version_1' is newer and has no checkpoint" in capsys.readouterr().err


def test_without_a_run_there_is_no_best(options, capsys):
    assert "no run below 'runs'" in error_line(capsys, "test", *options, "--ckpt_path=best")
