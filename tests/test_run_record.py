"""The record of a run: config, environment, history, validations and time forecast."""

import json
import subprocess
from types import SimpleNamespace

import torch
from helpers import last_checkpoint, run_dir, summary, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import slzo
from slzo.__main__ import main
from slzo.report import forecast
from slzo.report.forecast import Forecast, duration
from slzo.utils.environment import environment, git_commit


def record(name, number=0):
    return json.loads((run_dir(number) / name).read_text())


def test_a_saved_config_gives_the_same_weights_and_the_record_says_with_what(options):
    fit = [*options, "--trainer.enable_progress_bar=false", "--trainer.max_steps=6", "--model.seed=5"]
    assert main(["fit", *fit]) == 0
    assert main(["fit", "--config=runs/version_0/config.yaml"]) == 0
    one, other = (tuned(last_checkpoint(number)) for number in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (record("environment.json", number) for number in (0, 1))
    assert first["seeds"] == {"noise": 5, "rows": 0}
    assert first["threads"] == torch.get_num_threads()
    assert first["rows"] == {"train": 40, "dev": 16}
    assert first["continued_from"] is None
    assert {**first, "command": ""} == {**second, "command": ""}


def test_a_resumed_run_names_its_checkpoint_and_goes_on_with_its_points(options):
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert record("environment.json", 1)["continued_from"].endswith("last.ckpt")
    before, points = (record("history.json", number)["points"] for number in (0, 1))
    assert [point["step"] for point in points] == [2, 4, 6, 8]
    assert points[:2] == before
    for name in ("evaluations", "seconds"):
        assert [point[name] for point in points] == sorted(point[name] for point in points)


def test_the_last_step_is_validated(options):
    short = [*options, "--trainer.enable_progress_bar=false", "--trainer.max_steps=7", "--trainer.val_check_interval=4"]

    def validated(*more, number):
        assert main(["fit", *short, *more]) == 0
        return [validation["step"] for validation in summary(number)["validations"]]

    assert validated(number=0) == [4, 7]
    events = EventAccumulator(str(run_dir()))
    events.Reload()
    assert [event.step for event in events.Scalars("val/loss")] == [3, 6]  # Lightning counts from 0
    # the interval goes on
    assert validated("--trainer.max_steps=9", "--ckpt_path=last", number=1) == [4, 7, 8, 9]
    assert validated("--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false", number=2) == []
    epochs = ["--trainer.max_steps=-1", "--trainer.max_epochs=1", "--trainer.check_val_every_n_epoch=2"]
    assert validated(*epochs, "--trainer.val_check_interval=1.0", number=3) == [5]


def test_versions_and_processor_are_named():
    found = environment()
    assert found["versions"]["torch"] == torch.__version__
    assert found["versions"]["slzo"] == slzo.__version__
    assert found["processor"]
    json.dumps(found)


def test_the_commit_says_where_files_were_changed(tmp_path):
    assert git_commit(tmp_path / "nowhere") is None

    def git(*args):
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", "-C", tmp_path, *who, *args], check=True, capture_output=True, text=True).stdout

    git("init")
    assert git_commit(tmp_path) is None  # nothing of it is in the repository
    (tmp_path / "file").write_text("one")
    git("add", ".")
    git("commit", "-m", "first")
    commit = git("rev-parse", "HEAD").strip()
    assert git_commit(tmp_path) == commit
    (tmp_path / "file").write_text("two")
    assert git_commit(tmp_path) == commit + "+"


def test_a_run_says_what_it_will_take(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=12", "--trainer.val_check_interval=5"]) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Expect")]
    for part in ("8 steps of", "2 validations of", "held-out rows", "memory about"):
        assert part in line
    assert main(["fit", *options, "--trainer.max_steps=4"]) == 0
    assert "Expect" not in capsys.readouterr().out


def test_a_forecast_adds_up(monkeypatch):
    now = iter([0.0, 9.0, 10.0, 10.5, 11.0, 11.5, 12.0, 12.5])  # a slow first step, then half a second each
    monkeypatch.setattr(forecast, "time", SimpleNamespace(perf_counter=lambda: next(now)))
    known, ended = Forecast(), []
    for _ in range(4):
        known.begin()
        ended.append(known.end())
    assert ended == [False, False, False, True]
    splits = SimpleNamespace(dev=range(20), test=range(50))
    assert "4 validations not counted" in known.line(100, 25, splits, 1.0)
    known.row_seconds = 0.1
    assert known.line(100, 25, splits, 1.26) == (
        "Expect     up to 1 min 3 s more (100 steps of 0.5 s, 4 validations of 2 s, held-out rows 5 s); memory about 1.3 GiB"
    )
    assert known.line(4, 25, splits, 1.0) == ""
    assert [duration(s) for s in (59.4, 200, 7500)] == ["59 s", "3 min 20 s", "2 h 5 min"]
