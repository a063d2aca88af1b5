"""Examples in docs/ that other tests do not run: rule with trials, reward, export format, command, Python."""

import json
import re
import sys
from pathlib import Path
from types import MappingProxyType, ModuleType

import numpy as np
import pytest
import yaml
from helpers import ROOT, last_checkpoint, on_tiny, page_code, run_dir, run_fit, summary, tuned, write_lines

from slzo.__main__ import main
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.commands.registry import COMMANDS, Command
from slzo.export import write

PAGE = "docs/extending.md"


def write_config(name, file):
    """Write an example's two files into the current folder."""
    Path(file).write_text(page_code(PAGE, name))
    Path("example.yaml").write_text(config := page_code(PAGE, name, "yaml"))
    return yaml.safe_load(config)


def test_a_rule_with_trials(options):
    init_args = write_config("rule_with_trials", "my_parts.py")["profiler"]["rule"]["init_args"]
    given = [option for option in options if not option.startswith("--profiler.rule")]
    assert main(["fit", *given, "--config=example.yaml"]) == 0
    race = json.loads((run_dir() / "race.json").read_text())
    assert sorted(race["trials"], key=int) == [str(layer) for layer in init_args["layers"]]
    assert race["layer"] == summary()["dominant_layer"]
    assert all(len(trial["losses"]) == init_args["steps"] for trial in race["trials"].values())


def test_a_reward(options):
    arguments = write_config("reward", "my_rewards.py")["data"]["reward"][0]["arguments"]
    write_lines("rows.jsonl", [{"text": f"row {number}"} for number in range(60)])
    task = {"prompt": "{text}", "max_new_tokens": 4, "train_file": "rows.jsonl"}
    Path("task.yaml").write_text(
        yaml.safe_dump({"data": {"task": {"class_path": "slzo.tasks.template.TemplateTask", "init_args": task}}})
    )
    given = [option for option in options if not option.startswith(("--data.task", "--data.data_dir"))]
    assert main(["fit", *given, "--trainer.max_steps=2", "--config=task.yaml", "--config=example.yaml"]) == 0
    assert summary()["metric"] == "reward"
    assert 0 < summary()["score_after"] <= 0.5
    scope = {}
    exec(page_code(PAGE, "reward"), scope)
    assert scope["brief"](["a" * arguments["limit"], "a" * 2 * arguments["limit"]], **arguments) == [1.0, 0.5]


def test_an_export_format(options, monkeypatch, once):
    scope = {}
    exec(page_code(PAGE, "export"), scope)
    monkeypatch.setattr(write, "FORMATS", MappingProxyType({**write.FORMATS, "npz": scope["NPZ"]}))
    once(run_fit, *options)
    path = last_checkpoint()
    folder = write.export_checkpoint(read_checkpoint(path), "out", "npz")
    with np.load(folder / "tuned.npz") as arrays:
        assert {name: array.tolist() for name, array in arrays.items()} == {
            name: tensor.tolist() for name, tensor in tuned(path).items()
        }


def test_a_command(options, monkeypatch, capsys):
    module = ModuleType("slzo.commands.lengths")
    exec(page_code(PAGE, "command"), vars(module))
    monkeypatch.setitem(sys.modules, module.__name__, module)
    registration = re.search(r'`(Command\("lengths".*?\))`', (ROOT / PAGE).read_text(encoding="utf-8"))[1]
    commands = MappingProxyType({**COMMANDS, "lengths": eval(registration, {"Command": Command})})
    for place in ("slzo.__main__", "slzo.cli.run"):
        monkeypatch.setattr(f"{place}.COMMANDS", commands)
    assert main(["lengths", *options, "--split=dev"]) == 0
    assert re.search(r"^16 rows of \d+ to \d+ tokens$", capsys.readouterr().out, re.MULTILINE)


def test_rows_and_classes_of_ones_own_in_python(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [{"text": f"film {number}", "label": ["bad", "good"][number % 2]} for number in range(8)]
    write_lines("my_train.jsonl", rows)
    names: dict = {}
    exec(page_code("docs/runs.md", "own_classes"), names)
    assert names["model"].options.scope.describe().startswith("LoRA of rank 4")


def test_the_rows_from_python_of_the_page_on_runs(model_dir):
    names = {}
    exec(page_code("docs/runs.md", "own_rows"), names)
    rows = names["data"]
    rows.follow_model(str(model_dir))
    rows.setup("fit")
    assert [len(rows.rows(split)) for split in ("train", "dev", "test")] == [30, 10, 1]
    assert rows.rows("test")[0].example.prompt == "It is bad. It was"


@pytest.mark.parametrize("name", ["zo_trainer", "plain_trainer"])
def test_the_python_of_the_page_on_runs(name, model_dir, data_dir, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changes = {"max_steps=160": "max_steps=4, accelerator='cpu'", "val_check_interval=20": "val_check_interval=2"}
    exec(on_tiny(page_code("docs/runs.md", name), model_dir, data_dir, changes), {})
    folder = run_dir() if name == "zo_trainer" else Path("lightning_logs/version_0")
    assert (folder / "outlier_profile.json").exists()
    assert (
        (folder / "summary.json").exists() == (folder / "checkpoints" / "last.ckpt").exists() == (name == "zo_trainer")
    )
    assert Path("predictions.jsonl").exists() == (name == "zo_trainer")
    for path in (folder / "checkpoints").iterdir():  # the format of slzo
        assert read_checkpoint(path).content["global_step"] <= 4
    if name == "zo_trainer":
        exec(page_code("docs/runs.md", "export_python"), {})
        assert Path("tuned-model/model.safetensors").exists()


def test_the_adapter_of_the_tutorial_loads(options, model_dir):
    scope = ["--model.scope=ActivationSubspace", "--model.scope.rank=2", "--model.scope.target_modules=[mlp_output]"]
    assert main(["fit", *options, *scope]) == 0
    assert main(["export", "--ckpt_path=best", "--output=my-adapter"]) == 0
    names = {}
    exec(page_code("docs/tutorial.md", "tutorial_adapter").replace("BASE", str(model_dir)), names)
    assert any("lora_A" in name for name, _ in names["model"].named_parameters())
