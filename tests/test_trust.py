"""A run folder of somebody else runs no code: its config and its checkpoints are read without being named."""

import json
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from helpers import error_line, last_checkpoint, run_dir, run_fit, summary

from command_parsers import parser_of
from slzo.__main__ import main
from slzo.checkpoints import checkpoint_file
from slzo.checkpoints.checkpoint import read_checkpoint
from slzo.cli.option_types import types_in
from slzo.commands.registry import COMMANDS
from slzo.export.write import export_checkpoint
from slzo.private.parsers import options_of, type_of
from slzo.utils.config_code import CODE_OPTIONS, GROUPS, code_in

HOSTILE = {
    "a class": ("data: {task: {class_path: evil.T}}", "data.task 'evil.T'"),
    "its short form": ("data: {task: evil.T}", "data.task 'evil.T'"),
    "block style": ("data:\n  task:\n    class_path: evil.T\n", "data.task 'evil.T'"),
    "an anchor": ("a: &a {class_path: evil.T}\ndata: {task: *a}", "data.task 'evil.T'"),
    "a merge": ("guard: &a {class_path: evil.T}\ndata: {task: {<<: *a}}", "data.task 'evil.T'"),
    "YAML in a text": ("data: {task: '{class_path: evil.T}'}", "data.task '{class_path: evil.T}'"),
    "lines in a text": ("data:\n  task: |\n    class_path: evil.T\n", "data.task 'class_path: evil.T\\n'"),
    "a dotted key": ("data.task: evil.T", "data.task 'evil.T'"),
    "a dotted key inside": ("model: {optimizer.class_path: evil.f}", "model.optimizer.class_path 'evil.f'"),
    "an appended entry": ("trainer: {callbacks+: {class_path: evil.C}}", "trainer.callbacks+"),
    "another file": ("data: other.yaml", "data 'other.yaml'"),
    "another file inside": ("model: {engine: other.yaml}", "model.engine 'other.yaml'"),
    "a file for a class": ("data: {task: other.yaml}", "data.task 'other.yaml'"),
    "a file with a task's name": ("data: {task: sst2}", "data.task 'sst2'"),
    "standard input": ("data: {task: '-'}", "data.task '-'"),
    "another config": ("config: other.yaml", "config 'other.yaml'"),
    "a callback": ("trainer: {callbacks: [{class_path: evil.C}]}", "trainer.callbacks 'evil.C'"),
    "a function": ("model: {optimizer: evil.f}", "model.optimizer 'evil.f'"),
    "torch's function": ("model: {optimizer: {class_path: torch.hub.load}}", "model.optimizer 'torch.hub.load'"),
    "a class by an import": (
        "model: {optimizer: {class_path: torch.optim.sgd.warnings.catch_warnings}}",
        "model.optimizer 'torch.optim.sgd.warnings.catch_warnings'",
    ),
    "a path to a module": ("model: {scope: {class_path: slzo.cli.app.Path}}", "model.scope 'slzo.cli.app.Path'"),
    "a schedule's function": (
        "model: {lr_scheduler: {class_path: torch.optim.lr_scheduler.LambdaLR, init_args: {lr_lambda: evil.f}}}",
        "model.lr_scheduler.lr_lambda 'evil.f'",
    ),
    "a callback's function": (
        "trainer: {callbacks: {class_path: lightning.pytorch.callbacks.LambdaCallback, init_args: {setup: evil.f}}}",
        "trainer.callbacks.setup 'evil.f'",
    ),
    "a callback's short name": ("trainer: {callbacks: [LambdaCallback]}", "trainer.callbacks 'LambdaCallback'"),
    "a class inside": (
        "trainer: {strategy: {class_path: lightning.pytorch.strategies.SingleDeviceStrategy, "
        "init_args: {checkpoint_io: {class_path: lightning.pytorch.plugins.TorchCheckpointIO}}}}",
        "trainer.strategy.checkpoint_io 'lightning.pytorch.plugins.TorchCheckpointIO'",
    ),
    "pickles": ("trainer: {plugins: [TorchCheckpointIO]}", "trainer.plugins 'TorchCheckpointIO'"),
    "a class in a mapping": ("model: {device_map: {x: {class_path: evil.T}}}", "model.device_map 'evil.T'"),
    "other arguments": (
        "trainer: {logger: {class_path: slzo.lightning.loggers.RunLogger, dict_kwargs: {a: {class_path: evil.T}}}}",
        "trainer.logger.dict_kwargs 'evil.T'",
    ),
    "arguments in a file": (
        "model: {scope: {class_path: slzo.zo.scopes.LoRA, init_args: other.yaml}}",
        "model.scope 'slzo.zo.scopes.LoRA'",
    ),
    "a rule": ("profiler: {rule: {class_path: evil.T}}", "profiler.rule 'evil.T'"),
    "a reward": ("data: {reward: [{function: evil.f}]}", "data.reward 'evil.f'"),
    "a reward's file": ("data: {reward: evil.py:f}", "data.reward 'evil.py:f'"),
    "an objective's reward": (
        "data: {objective: {class_path: slzo.zo.objectives.Reward, init_args: {functions: [{function: evil.f}]}}}",
        "data.objective.functions 'evil.f'",
    ),
    "a quantization": (
        "model: {quantization: {class_path: subprocess.Popen}}",
        "model.quantization 'subprocess.Popen'",
    ),
    "a model's code": ("model: {trust_remote_code: true}", "model.trust_remote_code true"),
    "a tokenizer's code": ("data: {trust_remote_code: 'yes'}", "data.trust_remote_code 'yes'"),
}
HARMLESS = """
model:
  scope: {class_path: slzo.zo.scopes.LoRA, init_args: {rank: 8, alpha: 1.0, target_modules: [q_proj], layers: all}}
  optimizer: {class_path: torch.optim.AdamW, init_args: {lr: 0.1, betas: [0.9, 0.9], foreach: null}}
  lr_scheduler: {class_path: torch.optim.lr_scheduler.LinearLR, init_args: {start_factor: 0.5, total_iters: 7}}
  quantization: {class_path: transformers.BitsAndBytesConfig, init_args: {load_in_8bit: true}}
  device_map: {model.layers.0: cpu}
  engine: {cache_dir: my.folder}
  trust_remote_code: false
data:
  task:
    class_path: slzo.tasks.template.TemplateTask
    init_args: {name: My rows, train_file: my.train.jsonl, prompt: "{text} It was", candidates: [" a.b", " no"]}
  objective: {class_path: slzo.zo.objectives.Reward, init_args: {functions: accuracy}}
  reward: [{function: regex, weight: 2, arguments: {pattern: "a.b:c"}}]
profiler: {rule: {class_path: slzo.zo.selection.Race, init_args: {}}, text_file: a.b}
trainer:
  strategy: ddp_spawn
  accelerator: auto
  precision: bf16-true
  logger: {class_path: lightning.pytorch.loggers.CSVLogger, init_args: {save_dir: my.runs, name: A b}}
  callbacks: [{class_path: lightning.pytorch.callbacks.EarlyStopping, init_args: {monitor: val/loss, mode: min}}]
"""


@pytest.mark.fast
@pytest.mark.parametrize(("text", "entry"), HOSTILE.values(), ids=HOSTILE)
def test_foreign_code_is_found_in_any_form(text, entry, tmp_path):
    (tmp_path / "sst2").write_text("class_path: evil.T")
    assert any(found.startswith(entry) for found in code_in(yaml.safe_load(text), (tmp_path,)))
    assert "evil" not in sys.modules


@pytest.mark.fast
def test_what_comes_with_slzo_torch_and_lightning_is_no_foreign_code(tmp_path):
    assert code_in(yaml.safe_load(HARMLESS), (tmp_path,)) == []


@pytest.mark.fast
def test_every_option_that_takes_a_class_is_looked_at():
    options = [(action.dest, type_of(action)) for action in options_of(parser_of(COMMANDS["fit"]))]
    plain = ("builtins", "datetime", "pathlib", "typing", "types")
    classes = {
        name
        for name, hint in options
        for kind in types_in(hint)
        if getattr(kind, "__module__", "typing").partition(".")[0] not in plain and not name.endswith(".help")
    }
    texts = {"model.quantization", "data.reward"}  # names of classes and functions
    assert classes | texts == CODE_OPTIONS
    own = {name for name, hint in options if hint is None and any(each.startswith(f"{name}.") for each, _ in options)}
    assert own == GROUPS.keys()


@pytest.fixture
def own_task(options, monkeypatch):
    """Options of a run with a task of the user's own."""
    Path("trusted_task.py").write_text(
        "from pathlib import Path\nfrom slzo.tasks.sst2 import Sst2\n\n\nclass Own(Sst2):\n"
        "    def __init__(self, shots: int = 0):\n        self.shots = shots\n        Path('ran').touch()\n"
    )
    monkeypatch.syspath_prepend(str(Path.cwd()))
    task = ["--data.task=trusted_task.Own", "--data.task.shots=1"]
    return [each for each in options if each != "--data.task=sst2"] + [*task, "--trainer.max_steps=2"]


def test_a_run_with_own_code_is_used_with_its_config(own_task, capsys):
    assert main(["fit", *own_task]) == 0
    Path("ran").unlink()
    del sys.modules["trusted_task"]
    config = str(run_dir() / "config.yaml")
    for command in ("test --ckpt_path last", f"predict --ckpt_path {last_checkpoint()}", f"replay --run {run_dir()}"):
        line = error_line(capsys, *shlex.split(command))
        assert f"data.task 'trusted_task.Own' in {config!r}: would run code" in line
        assert line.endswith(f"if you trust it, give --config {config}")
    assert not Path("ran").exists()
    assert "trusted_task" not in sys.modules
    test, predict, export, _ = summary()["use"]
    assert all(command.split()[2:4] == ["--config", config] for command in (test, predict))
    assert main(shlex.split(export)[1:]) == 0
    assert not Path("ran").exists()
    assert main(shlex.split(predict)[1:]) == 0
    assert Path("ran").exists()


def test_code_of_a_model_needs_the_option(options, capsys):
    assert main(["fit", *options, "--trainer.max_steps=2", "--model.trust_remote_code=true"]) == 0
    *_, export, generate = (shlex.split(command) for command in summary()["use"])
    assert generate[2:4] == export[2:4] == ["--trust_remote_code", "true"]
    config = str(run_dir() / "config.yaml")
    test = ["test", f"--ckpt_path={last_checkpoint()}"]
    advice = f"if you trust it, give --config {config} or --model.trust_remote_code true"
    assert error_line(capsys, *test).endswith(advice)
    assert main([*test, "--model.trust_remote_code=true"]) == 0
    line = error_line(capsys, "generate", f"--ckpt_path={last_checkpoint()}", "--prompt=x")
    assert line.endswith("runs its own code; if you trust it, give --trust_remote_code true")


def test_a_card_imports_no_task_of_a_checkpoint(options, monkeypatch, once):
    Path("card_task.py").write_text("open('ran', 'w')")
    monkeypatch.syspath_prepend(str(Path.cwd()))
    once(run_fit, *options, "--trainer.max_steps=2")
    content = read_checkpoint(last_checkpoint()).content
    content["slzo"]["settings"]["data.task"] = "card_task.Task"
    checkpoint_file.write(content, last_checkpoint())
    export_checkpoint(read_checkpoint(last_checkpoint()), "out")
    assert "card_task.Task" in Path("out/README.md").read_text()
    assert json.loads(Path("out/slzo.json").read_text())["format"] in ("merged", "adapter")
    assert not Path("ran").exists()
