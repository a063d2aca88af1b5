"""A task, a scope, an estimator, a rule and an objective of the user's own: one file outside of the package, named in YAML."""

import json
from pathlib import Path

import pytest
import torch
import yaml
from helpers import error_line, last_checkpoint, page_code, run_dir, summary, tuned
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.tasks.registry import get_task
from slzo.utils.errors import SlzoError

SCOPES = '''
from enum import Enum
from pathlib import Path

from slzo.zo.scopes import Scope
from slzo.zo.tuned import TunedTensors


class Weights(Enum):
    MATRICES = 2
    VECTORS = 1


class OneKind(Scope):
    """The matrices, or the vectors, of the dominant layer."""

    def __init__(self, which: Weights = Weights.MATRICES, notes: Path | None = None) -> None:
        self.which = which
        self.notes = notes

    def tensors(self, context):
        prefix = f"{context.parts.layers_path}.{context.layer}."
        own = context.parts.model.named_parameters()
        chosen = {k: v for k, v in own if k.startswith(prefix) and v.dim() == self.which.value}
        return TunedTensors(chosen)

    def describe(self):
        return f"the {self.which.name.lower()} of the dominant layer"


class Callback(Scope):
    """Holds what no checkpoint could."""

    def __init__(self, size: int = 1) -> None:
        self.size = lambda: size

    def tensors(self, context):
        raise AssertionError

    def describe(self):
        return "nothing"


'''


def example(name):
    """An example of the page on plug-ins."""
    return page_code("docs/extending.md", name)


@pytest.fixture
def config(tmp_path, model_dir, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("own_parts.py").write_text("\n\n".join([SCOPES, *map(example, ("task", "estimator", "rule", "objective"))]))
    for name, count in (("train", 40), ("test", 12)):
        rows = [{"text": f"a {('dull', 'fine')[i % 2]} film {name} {i}", "good": i % 2} for i in range(count)]
        Path(f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    content = {
        "trainer": {"accelerator": "cpu", "max_steps": 3, "val_check_interval": 3, "enable_progress_bar": False},
        "model": {
            "model": str(model_dir),
            "scope": {"class_path": "own_parts.OneKind", "init_args": {"which": "MATRICES", "notes": "why.txt"}},
            "estimator": "own_parts.Signs",
            "optimizer": {"class_path": "torch.optim.SGD", "init_args": {"lr": 1e-2}},
            "eps": 1e-2,
        },
        "data": {
            "task": {"class_path": "own_parts.Reviews", "init_args": {"folder": "."}},
            "objective": {"class_path": "own_parts.Margin", "init_args": {"width": 2.0}},
            "num_train": 24,
            "num_dev": 8,
            "batch_size": 8,
        },
        "profiler": {"rule": {"class_path": "own_parts.Last", "init_args": {"back": 1}}},
    }
    Path("own.yaml").write_text(yaml.safe_dump(content))
    return "--config=own.yaml"


def test_everything_of_ones_own_through_fit_resume_test_and_export(config, model_dir):
    assert main(["fit", config]) == 0
    found = summary()
    assert (found["task"], found["dominant_layer"], found["layer_reason"]) == ("own_reviews", 2, "the last layers")
    assert (found["scope"], found["estimator"]) == ("the matrices of the dominant layer", "Signs")
    assert main(["fit", config, "--trainer.max_steps=6"]) == 0
    assert main(["fit", config, "--trainer.max_steps=6", f"--ckpt_path={last_checkpoint(0)}"]) == 0
    whole, resumed = tuned(last_checkpoint(1)), tuned(last_checkpoint(2))
    assert whole.keys() == resumed.keys()
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)
    assert main(["test", f"--config={run_dir(2) / 'config.yaml'}", "--ckpt_path=last"]) == 0
    assert main(["export", "--ckpt_path=last", "--output=out"]) == 0
    before = AutoModelForCausalLM.from_pretrained(model_dir).state_dict()
    after = AutoModelForCausalLM.from_pretrained("out").state_dict()
    assert {name for name in after if not torch.equal(after[name], before[name])} == set(resumed)


def test_the_objective_is_what_is_minimized(config):
    losses = []
    for number, objective in enumerate(("own_parts.Margin", "CandidateCrossEntropy")):
        assert main(["fit", config, f"--data.objective={objective}", "--trainer.log_every_n_steps=1"]) == 0
        events = EventAccumulator(str(run_dir(number)))
        events.Reload()
        losses.append(events.Scalars("train/loss_plus")[0].value)
    assert losses[0] != pytest.approx(losses[1], rel=0.05)


def test_the_scope_of_the_page(config):
    Path("my_scope.py").write_text(example("scope"))
    assert main(["fit", config, "--model.scope=my_scope.Matrices"]) == 0
    assert {tensor.dim() for tensor in tuned(last_checkpoint()).values()} == {2}


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("import nonexistent", "cannot be imported (ModuleNotFoundError: No module named 'nonexistent'), line 1 of"),
        ("x = 1\nclass Mine:\n    size = y", "cannot be imported (NameError: name 'y' is not defined), line 3 of"),
        ("\nclass Mine(\n", "cannot be imported (SyntaxError: '(' was never closed), line 2 of"),
        ("class Other: pass", "has no Mine"),
        (None, "cannot be imported (ModuleNotFoundError: No module named 'broken"),
    ],
)
@pytest.mark.parametrize("option", ["model.scope", "data.task", "model.optimizer", "profiler.rule"])
def test_what_is_wrong_with_a_class_path_is_told(config, capsys, request, option, code, reason):
    module = f"broken_{abs(hash(request.node.name))}"
    if code is not None:
        Path(f"{module}.py").write_text(code)
    group, name = option.split(".")
    Path("more.yaml").write_text(f"{group}: {{{name}: {{class_path: {module}.Mine}}}}")
    for given in ("--config=more.yaml", f"--{option}={module}.Mine"):
        assert f"{option} '{module}.Mine': {module} {reason}" in error_line(capsys, "fit", config, given)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("Needs", "needs data.task.folder"),
        ("NUMBER", "not a task; give a subclass of slzo.tasks.base.Task"),
        ("Gone", "plain_tasks has no Gone"),
        ("Plain", None),
    ],
)
def test_a_task_by_its_class_path_alone(tmp_path, monkeypatch, name, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    Path("plain_tasks.py").write_text(
        "from slzo.tasks.sst2 import Sst2\nNUMBER = 3\nclass Plain(Sst2):\n    name = 'plain'\n"
        "class Needs(Sst2):\n    def __init__(self, folder):\n        self.folder = folder\n"
    )
    if told is None:
        assert get_task(f"plain_tasks.{name}").name == "plain"
    else:
        with pytest.raises(SlzoError, match=rf"^data.task 'plain_tasks.{name}': {told}"):
            get_task(f"plain_tasks.{name}")


def test_a_step_without_a_finite_loss_moves_nothing_whatever_the_estimator_returns(config):
    assert main(["fit", config, "--model.eps=1e30", "--trainer.max_steps=2"]) == 0
    assert summary()["skipped_steps"] == 2
    assert all(tensor.isfinite().all() for tensor in tuned(last_checkpoint()).values())


def test_arguments_must_be_kept_and_fit_into_a_checkpoint(config, capsys):
    Path("forgets.py").write_text(SCOPES.replace("self.notes = notes", "pass"))
    line = error_line(capsys, "fit", config, "--model.scope=forgets.OneKind")
    assert "OneKind must keep its argument notes as an attribute of that name" in line
    line = error_line(capsys, "fit", config, "--model.scope=own_parts.Callback")
    assert "model.scope.size: a function cannot be kept in a checkpoint" in line
    assert not Path("runs").exists()


def test_another_argument_of_the_objective_is_told_on_resume(config, capsys):
    assert main(["fit", config]) == 0
    assert main(["fit", config, "--data.objective.width=3", "--trainer.max_steps=4", "--ckpt_path=last"]) == 0
    assert "objective.width: 2.0 -> 3.0" in capsys.readouterr().err
