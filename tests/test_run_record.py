"""What is written beside a run for others to get the same numbers, and that they do."""

import json
import subprocess

import torch
from conftest import run_dir, tuned

import slzo
from slzo.__main__ import main
from slzo.utils.environment import environment, git_commit


def test_a_saved_config_gives_the_same_weights_and_the_record_says_with_what(options):
    fit = [*options, "--trainer.enable_progress_bar=false", "--trainer.max_steps=6", "--model.seed=5"]
    assert main(["fit", *fit]) == 0
    assert main(["fit", "--config=runs/version_0/config.yaml"]) == 0
    one, other = (tuned(run_dir(number) / "checkpoints" / "last.ckpt") for number in (0, 1))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    first, second = (json.loads((run_dir(number) / "environment.json").read_text()) for number in (0, 1))
    assert first["seeds"] == {"noise": 5, "rows": 0}
    assert first["threads"] == torch.get_num_threads()
    assert first["rows"] == {"train": 40, "dev": 16}
    assert first["continued_from"] is None
    first.pop("command")
    second.pop("command")
    assert first == second
    assert main(["fit", *fit, "--trainer.max_steps=7", "--ckpt_path=last"]) == 0
    assert json.loads((run_dir(2) / "environment.json").read_text())["continued_from"].endswith("last.ckpt")


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
