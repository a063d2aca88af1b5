"""The record of a run: config, environment, history and validations."""

import json
import subprocess
from itertools import count
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import last_checkpoint, run_dir, run_fit, same_tensors, summary, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import slzo
from slzo import fit
from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.models.parts import ModelParts
from slzo.report.run_files import read_run
from slzo.utils.environment import environment, git_commit


def record(name, number=0):
    return json.loads((run_dir(number) / name).read_text())


def test_held_out_rows_run_through_the_lower_layers_once(options, monkeypatch):
    """Their states are kept from the scores before training for those after it."""
    run, score, starts, lowest = ModelParts.run, fit.score_held_out, [], []

    def counted(self, batch, start, *args, **more):
        starts.append(start)
        return run(self, batch, start, *args, **more)

    def scored(*args):
        starts.clear()
        found = score(*args)
        lowest.append(min(starts))
        return found

    monkeypatch.setattr(ModelParts, "run", counted)
    monkeypatch.setattr(fit, "score_held_out", scored)
    monkeypatch.setattr("slzo.data.batch._MIN_SAVING", 2)  # the made-up rows share beginnings; such rows are not cached
    for more, expected in (([], [0, 2]), (["--record.test_before=false"], [0])):
        assert main(["fit", *options, "--model.layer=2", "--trainer.max_steps=2", *more]) == 0
        assert lowest == expected
        lowest.clear()
    assert summary(0)["score_after"] == summary(1)["score_after"]


def test_a_saved_config_gives_the_same_weights_and_the_record_says_with_what(options):
    fit = [*options, "--trainer.enable_progress_bar=false", "--trainer.max_steps=6", "--model.seed=5"]
    assert main(["fit", *fit]) == 0
    assert main(["fit", "--config=runs/version_0/config.yaml"]) == 0
    one, other = (tuned(last_checkpoint(number)) for number in (0, 1))
    assert one.keys() == other.keys()
    assert same_tensors(one, other)
    first, second = (record("environment.json", number) for number in (0, 1))
    assert first["seeds"] == {"noise": 5, "rows": 0}
    assert first["threads"] == torch.get_num_threads()
    assert first["rows"] == {"train": 40, "dev": 16}
    assert first["continued_from"] is None
    assert set(first["hub"].values()) == {None}
    assert {**first, "command": ""} == {**second, "command": ""}


def test_a_resumed_run_names_its_checkpoint_and_goes_on_with_its_points(options, once):
    once(run_fit, *options, "--trainer.max_steps=4")
    assert main(["fit", *options, "--ckpt_path=last"]) == 0
    assert record("environment.json", 1)["continued_from"].endswith("last.ckpt")
    before, points = (record("history.json", number)["points"] for number in (0, 1))
    assert [point["step"] for point in points] == [2, 4, 6, 8]
    assert points[:2] == before
    for name in ("evaluations", "seconds"):
        assert [point[name] for point in points] == sorted(point[name] for point in points)


def untimed(content):
    """What does not depend on time or place; of paths only the file's name."""
    if isinstance(content, dict):
        commands = ("command", "run_dir", "use", "next", "first_order")
        kept = {name: value for name, value in content.items() if name not in commands}
        return {k: untimed(v) for k, v in kept.items() if not any(word in k for word in ("seconds", "memory"))}
    if isinstance(content, str) and "checkpoints/" in content:
        return Path(content).name
    return [untimed(value) for value in content] if isinstance(content, list) else content


def recorded(number):
    """What a run recorded, and what its page shows."""
    files = read_run(run_dir(number))
    page = files.profile, files.train, [(point.step, point.loss, point.score) for point in files.points]
    advice = [summary(number)[name].replace(str(run_dir(number)), "") for name in ("next", "first_order")]
    return [untimed(record(f"{name}.json", number)) for name in ("history", "summary", "samples")], page, advice


CHAINS = [  # where each run is ended at once, without saving: hook, steps done, options
    [("on_train_batch_end", 5, ""), ("on_train_batch_end", 7, "--last_checkpoint.every_n_steps=1")],
    pytest.param(
        [("on_validation_batch_start", 4, ""), ("on_validation_end", 8, ""), ("on_validation_start", 10, "")],
        marks=pytest.mark.slow,
    ),
]


@pytest.mark.usefixtures("listening")
@pytest.mark.parametrize("chain", CHAINS)
def test_after_a_chain_of_crashes_the_record_is_that_of_an_uninterrupted_run(options, chain):
    fit = ["fit", *options, "--trainer.enable_progress_bar=false", "--trainer.max_steps=10", "--model.optimizer.lr=1"]
    fit += ["--trainer.val_check_interval=4", "--guard.factor=1.001"]
    assert main(fit) == 0
    whole = recorded(0)
    assert summary(0)["rollbacks"]
    for number, (place, step, more) in enumerate(chain, start=1):
        sender = {"callbacks": "signal_sender.SignalSender", "callbacks.place": place, "callbacks.step": step}
        sender["callbacks.times"] = 2
        crash = [f"--trainer.{name}={value}" for name, value in sender.items()]
        resume = ["--ckpt_path=last"] if number > 1 else []
        assert main([*fit, *crash, *more.split(), *resume]) == 130
        assert (run_dir(number) / "history.json").is_file()
    last = len(chain) + 1
    assert main([*fit, "--ckpt_path=last"]) == 0
    assert recorded(last) == whole
    continued = read_checkpoint(record("environment.json", last)["continued_from"]).content["callbacks"]["RunRecord"]
    assert all(summary(last)[name] > continued[name] > 0 for name in ("seconds", "train_seconds"))


def test_the_whole_time_includes_the_scores_after_training(options, monkeypatch):
    monkeypatch.setattr(fit, "time", SimpleNamespace(monotonic=count(0, 1000).__next__))  # they take 1,000 s
    assert main(["fit", *options, "--trainer.max_steps=1", "--record.test_before=false"]) == 0
    assert summary()["seconds"] > 1000 > summary()["train_seconds"]


def test_a_run_without_validations_has_a_history(options, once):
    once(run_fit, *options, "--trainer.max_steps=4")
    assert main(["fit", *options, "--trainer.limit_val_batches=0", "--ckpt_path=last"]) == 0
    assert [[p["step"] for p in record("history.json", number)["points"]] for number in (0, 1)] == [[2, 4]] * 2


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
    nothing = ["--trainer.limit_val_batches=0", "--trainer.enable_checkpointing=false", "--trainer.max_steps=1"]
    assert validated(*nothing, number=2) == []
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
