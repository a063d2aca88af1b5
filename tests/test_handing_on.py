"""From the summary of a run to what comes next: its best checkpoint by name, and the commands for it."""

import json
import shlex
import shutil
from pathlib import Path

from conftest import run_dir

from slzo.__main__ import main


def test_best_is_the_checkpoint_that_was_scored(options, capsys):
    assert main(["fit", *options, "--checkpoint.monitor=val/accuracy", "--checkpoint.mode=max"]) == 0
    output = capsys.readouterr().out
    summary = json.loads((run_dir() / "summary.json").read_text())
    best = summary["best_checkpoint"]
    assert Path(best).name != "last.ckpt"
    assert [shlex.split(command)[:4] for command in summary["use"]] == [
        ["slzo", name, "--ckpt_path", best] for name in ("test", "predict", "export", "generate")
    ]
    assert all(command in output for command in summary["use"])
    assert main(["test", "--ckpt_path=best"]) == 0
    printed = capsys.readouterr().out
    assert f"Using the best checkpoint of the newest run, {best}" in printed
    assert f"{summary['score_after']:.4f}" in printed.replace("\n", " ") or summary["score_after"] in (0, 0.5, 1)
    for command in summary["use"][1:3]:
        assert main(shlex.split(command)[1:]) == 0
    assert Path("predictions.jsonl").is_file()
    # moved, and without a file
    shutil.move("runs", "elsewhere")
    assert main(["export", "--ckpt_path=best", "--output=moved", "--trainer.logger.save_dir=elsewhere"]) == 0
    for path in Path("elsewhere").rglob("step=*.ckpt"):
        path.unlink()
    assert main(["export", "--ckpt_path=best", "--output=no", "--trainer.logger.save_dir=elsewhere"]) == 2
    assert "ckpt_path 'best': the run of" in capsys.readouterr().err


def test_without_a_run_there_is_no_best(options, capsys):
    assert main(["test", *options, "--ckpt_path=best"]) == 2
    assert "no run below 'runs'" in capsys.readouterr().err
