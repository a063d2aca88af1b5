"""``--config quickstart`` finds slzo's own configs from any folder, in a clone and in an installed wheel."""

import tomllib
from pathlib import Path

import pytest
from helpers import ROOT, error_line

from slzo.cli import shipped_configs as shipped
from slzo.cli.shipped_configs import shipped_configs, with_shipped_configs

pytestmark = [pytest.mark.fast, pytest.mark.usefixtures("own_folder")]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")


def test_the_names_are_the_files_in_the_wheel():
    build = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["hatch"]["build"]["targets"]["wheel"]
    found = {
        kind: {path for pattern in build[kind] for path in ROOT.glob(pattern.lstrip("/")) if path.suffix == ".yaml"}
        for kind in ("include", "exclude")
    }
    assert set(shipped_configs().values()) == found["include"] - found["exclude"]
    assert build["sources"] == {"configs": "slzo/configs"}
    assert {"quickstart", "subspace", "paper/qwen3-8b"} <= set(shipped_configs())


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
        (["--config", "quickstart", "-c", "own.yaml"], ["--config", QUICKSTART, "-c", "own.yaml"]),
        (["--prompt", "quickstart", "--config"], ["--prompt", "quickstart", "--config"]),
        (["--config", "folder"], ["--config", "folder"]),
    ],
)
def test_a_name_becomes_a_path(given, read):
    assert with_shipped_configs(given) == read


def test_a_file_of_that_name_comes_first_and_a_folder_does_not():
    Path("quickstart").mkdir()
    assert with_shipped_configs(["--config=quickstart"]) == [f"--config={QUICKSTART}"]
    Path("subspace").touch()
    assert with_shipped_configs(["--config=subspace"]) == ["--config=subspace"]


def test_an_unknown_name_lists_the_names(capsys):
    line = error_line(capsys, "report", "--config", "quick")
    assert "--config 'quick': no such file" in line
    assert all(name in line for name in shipped_configs())


@pytest.mark.parametrize(("name", "tool"), [("chat", "chat_task"), ("json_reward", "json_task")])
def test_a_config_that_needs_the_repository_says_so(name, tool, capsys):
    line = error_line(capsys, "plan", "--config", name)
    assert f"{tool}/test.jsonl" in line
    assert line.endswith(f"this config needs tools/{tool}.py of slzo's repository; run it in a clone")
