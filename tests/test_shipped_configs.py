"""How to begin: ``--config quickstart`` finds slzo's own configs from any folder, and a run needs a task."""

import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, error_line

from slzo.__main__ import main
from slzo.cli import shipped_configs as shipped
from slzo.cli.given import one_word_each
from slzo.cli.shipped_configs import shipped_configs, with_shipped_configs
from slzo.commands.registry import COMMANDS
from slzo.datamodule import TaskDataModule
from slzo.utils.errors import SlzoError

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("own_folder")]
QUICKSTART, CHAT = (str(ROOT / "configs" / f"{name}.yaml") for name in ("quickstart", "chat"))


def test_the_names_are_the_files_in_the_wheel():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    found = {
        kind: {path for pattern in build[kind] for path in ROOT.glob(pattern.lstrip("/")) if path.suffix == ".yaml"}
        for kind in ("include", "exclude")
    }
    assert set(shipped_configs().values()) == found["include"] - found["exclude"]
    assert build["sources"] == {"configs": "slzo/configs"}
    assert {"quickstart", "chat", "paper/qwen3-8b"} <= set(shipped_configs())


def test_the_configs_of_a_wheel_are_in_the_package(tmp_path, monkeypatch):
    installed = tmp_path / "slzo" / "configs"
    installed.mkdir(parents=True)
    (installed / "quickstart.yaml").touch()
    (tmp_path / "configs").mkdir()  # of another package
    monkeypatch.setattr(shipped, "_FOLDERS", (installed, tmp_path / "configs"))
    assert shipped_configs() == {"quickstart": installed / "quickstart.yaml"}


@pytest.mark.parametrize(
    ("given", "read"),
    [
        (["--config=quickstart"], [f"--config={QUICKSTART}"]),
        (["--config", "quickstart", "-c", "own.yaml"], [f"--config={QUICKSTART}", "--config=own.yaml"]),
        (["--prompt", "quickstart", "--config"], ["--prompt=quickstart", "--config"]),
        (["--config", "folder"], ["--config=folder"]),
        (
            ["--layer", "-1", "--help", "word", "--print_config", "-c=chat"],
            ["--layer=-1", "--help", "word", f"--config={CHAT}", "--print_config"],
        ),
    ],
)
def test_a_name_becomes_a_path(given, read):
    assert with_shipped_configs(one_word_each(given)) == read


def test_a_file_of_that_name_comes_first_and_a_folder_does_not():
    Path("quickstart").mkdir()
    assert with_shipped_configs(["--config=quickstart"]) == [f"--config={QUICKSTART}"]
    Path("chat").touch()
    assert with_shipped_configs(["--config=chat"]) == ["--config=chat"]


def test_an_unknown_name_lists_the_names(capsys):
    line = error_line(capsys, "report", "--config", "quick")
    assert "--config 'quick': no such file" in line
    assert all(name in line for name in shipped_configs())


@pytest.mark.parametrize(("name", "tool"), [("chat", "chat_task"), ("json_reward", "json_task")])
def test_a_config_that_needs_the_repository_says_so(name, tool, capsys):
    line = error_line(capsys, "plan", "--config", name)
    assert f"{tool}/test.jsonl" in line
    assert line.endswith(f"this config needs tools/{tool}.py of slzo's repository; run it in a clone")


@pytest.mark.parametrize(
    "command", [command.name for command in COMMANDS.values() if command.has_app and command.reads_rows]
)
def test_a_command_without_a_task_shows_two_ways_to_begin(command, capsys):
    required = ["--output=x"] if command == "predict" else []
    assert main([command, *required]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert f"slzo {command} --config quickstart, or with a task, as in slzo {command} --data.task movie_reviews" in line
    assert not list(Path().iterdir())


def test_a_command_that_reads_no_rows_needs_no_task(capsys):
    assert "'nope'" in error_line(capsys, "export", "--ckpt_path=nope", "--output=x")
    assert "run 'nope': no such folder" in error_line(capsys, "replay", "--run=nope")


def test_a_wrong_checkpoint_is_named_before_the_task(capsys):
    assert "nope.ckpt" in error_line(capsys, "test", "--ckpt_path=nope.ckpt")


def test_rows_in_python_need_a_task():
    with pytest.raises(SlzoError, match=r"^data.task: is required; name one, as in TaskDataModule"):
        TaskDataModule()
