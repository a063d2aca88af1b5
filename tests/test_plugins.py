"""A task, a scope, an estimator, a rule and an objective of the user's own: one file outside of the package, named in YAML."""

import dataclasses
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import yaml
from helpers import (
    Quadratic,
    error_line,
    last_checkpoint,
    page_code,
    run_dir,
    same_tensors,
    slzo_error,
    summary,
    tuned,
    write_lines,
)
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM

from slzo.__main__ import main
from slzo.evaluation.generation import Answer
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.tasks.base import Example, check_task, example_of
from slzo.tasks.registry import get_task
from slzo.tasks.sst2 import Sst2
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, Backprop, Estimate
from slzo.zo.estimators.base import EstimatorContext, estimate_of
from slzo.zo.objectives import AnswerObjective
from slzo.zo.scopes import LayerScope, Scope, ScopeContext, tensors_of
from slzo.zo.scopes.base import adapter_of, changed_layers_of
from slzo.zo.selection import Choice, SelectionContext, SelectionRule, choice_of
from slzo.zo.step import take_step
from slzo.zo.tuned import TunedTensors
from tiny import tiny_model

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
        write_lines(f"{name}.jsonl", rows)
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
    assert same_tensors(whole, resumed)
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
        ("class Other: pass", "has no Mine; correct the name"),
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


def test_a_module_of_another_folder_is_told_where_to_be(capsys):
    line = error_line(capsys, "fit", "--config=quickstart", "--model.scope=my_own_parts.Mine")
    assert line.endswith("; install it, or give the command in the folder that has my_own_parts.py")


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


def test_a_step_without_a_finite_loss_moves_nothing_whatever_the_estimator_returns(config, capsys):
    line = error_line(capsys, "fit", config, "--model.eps=1e30", "--trainer.max_steps=2")
    assert "the loss was infinite or NaN; no step was taken, so nothing was trained" in line
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


# option, base class and method that returns None, and what must be returned
CONTRACTS = [
    ("model.scope", "slzo.zo.scopes.Scope.tensors", "TunedTensors of at least one of the model's parameters"),
    ("profiler.rule", "slzo.zo.selection.SelectionRule.select", "a Choice of a layer from 0 to 3"),
    (
        "data.task",
        "slzo.tasks.sst2.Sst2.example",
        "an Example whose prompt, candidates, references and group are texts",
    ),
    ("data.objective", "slzo.zo.objectives.Objective.loss", "a Loss"),
    (
        "data.objective",
        "slzo.zo.objectives.CandidateObjective.losses_from_scores",
        "RowLosses with a total for each point",
    ),
    ("data.objective", "slzo.zo.objectives.LogitObjective.row_losses", "RowLosses with a total for each point"),
    ("model.estimator", "slzo.zo.estimators.SPSA.estimate", "an Estimate with numbers, and a float32 gradient by name"),
]


@pytest.mark.parametrize(("option", "place", "wanted"), CONTRACTS, ids=[place for _, place, _ in CONTRACTS])
def test_an_own_class_that_returns_nonsense_is_named(sst2_options, capsys, monkeypatch, option, place, wanted):
    monkeypatch.syspath_prepend(str(Path.cwd()))
    monkeypatch.delitem(sys.modules, "nonsense", raising=False)
    base, _, method = place.rpartition(".")
    module, _, name = base.rpartition(".")
    Path("nonsense.py").write_text(
        f"from {module} import {name}\nclass Own({name}):\n    def {method}(self, *given): pass\n"
        "    def describe(self): return 'nothing'\n"
    )
    short = ["--model.eps=1e-3", "--model.optimizer.lr=1e-3", "--data.num_train=20", "--data.num_dev=8"]
    line = error_line(capsys, "fit", *sst2_options, *short, "--record.test_before=false", f"--{option}=nonsense.Own")
    assert f"{option} nonsense.Own: {method}() returned None; it must return {wanted}" in line
    assert "(docs/extending.md)" in line


def own(base, method, returned):
    """An object of an own class whose method returns something."""
    return type("Own", (base,), {method: lambda self, *given: returned, "describe": lambda self: "nonsense"})()


@pytest.mark.parametrize("returned", ["layer 2", 2, Choice(99, ""), Choice(-2, ""), Choice("2", ""), Choice(1.0, "")])
def test_a_rule_must_choose_a_layer_of_the_model(returned):
    context = SelectionContext([None] * 4)
    assert choice_of(own(SelectionRule, "select", Choice(3, "")), context).layer == 3
    line = slzo_error(choice_of, own(SelectionRule, "select", returned), context)
    assert re.search(r"Own: select\(\) returned .*; it must return a Choice of a layer from 0 to 3 \(docs", line)


@pytest.mark.parametrize("trials", [None, [1], {1: (None, None)}])
def test_a_rule_must_return_trials_by_layer(trials):
    context = SelectionContext([None] * 4)
    line = slzo_error(choice_of, own(SelectionRule, "select", Choice(1, "", trials=trials)), context)
    assert re.search(r"Own: select\(\) returned trials .*; it must return a Choice whose trials are", line)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"gold": (7,)}, "gold (7,) for 2 candidates; for a row without a label, gold is ()"),
        ({"gold": (-1,)}, "gold (-1,) for 2 candidates; for a row without a label, gold is ()"),
        ({"gold": ("1",)}, "gold ('1',) for 2 candidates"),
        ({"gold": 1}, "gold 1 for 2 candidates"),
        ({"candidates": ()}, "gold (0,) for 0 candidates"),
        ({"candidates": (" a", " a")}, "candidates (' a', ' a'), two of which are equal"),
        ({"candidates": (1, 2)}, "candidates (1, 2), which are not a tuple of texts"),
        ({"candidates": " a"}, "candidates ' a', which are not a tuple of texts"),
        ({"prompt": 5}, "prompt 5, which is not text"),
        ({"id": 5}, "id 5, which is not text"),
    ],
)
def test_a_task_must_return_a_usable_example(changes, told):
    good = Example("1", "x", (" a", " b"), (0,))
    assert example_of(own(Sst2, "example", good), {}, "1") == good
    with pytest.raises(
        ValueError, match=rf"data\.task .*\.Own: example\(\) returned {re.escape(told)}; .*must return an"
    ):
        example_of(own(Sst2, "example", dataclasses.replace(good, **changes)), {}, "1")


@pytest.mark.parametrize(
    ("attribute", "value", "told"),
    [
        ("kind", "regression", "kind 'regression' is no slzo.tasks.base.Kind; choose one of Kind.CLASSIFICATION, "),
        ("kind", "generation", "kind 'generation' is no slzo.tasks.base.Kind; choose one of Kind.CLASSIFICATION, "),
        ("stop", None, "data.task.stop None: expected a list of texts"),
        ("metrics", None, "data.task.metrics None: expected a list of texts"),
        ("stop", (1,), "data.task.stop (1,): expected a list of texts"),
        ("name", 3, "data.task.name 3: "),
        ("fields", "text", "data.task.fields 'text': is one text; give a list"),
        ("metrics", "f1", "data.task.metrics 'f1': is one text; give a list"),
        ("stop", ("",), "data.task.stop ['']: one is empty"),
        ("max_new_tokens", "5", "data.task.max_new_tokens '5': is a str; give a whole number"),
        ("max_new_tokens", 0, "data.task.max_new_tokens 0: must be at least 1"),
    ],
)
def test_a_wrong_attribute_of_a_task_is_named(attribute, value, told):
    assert told in slzo_error(check_task, type("Own", (Sst2,), {attribute: value})())


def test_one_text_is_no_list_of_answers():
    assert "answers 'great': is one text; give a list" in slzo_error(Example.from_answers, "1", "x", "great")


def test_a_scope_must_return_tensors_of_the_model():
    model = tiny_model()
    context = ScopeContext(ModelParts(model), 1, lambda count: [])
    name, tensor = next(iter(model.named_parameters()))
    for returned, told in (
        (
            TunedTensors({name: tensor.clone()}),
            rf"returned a copy of '{re.escape(name)}', so the model would not change",
        ),
        ({}, r"returned \{\}"),
        (TunedTensors({}), "returned no tensors"),
        (TunedTensors({"x": torch.zeros(2)}), "returned a tensor 'x', which the model does not have"),
        (
            TunedTensors({name: tensor[:4]}),
            f"returned a part or another view of '{re.escape(name)}', which no checkpoint",
        ),
        (
            TunedTensors({name: tensor.T}),
            f"returned a part or another view of '{re.escape(name)}', which no checkpoint",
        ),
    ):
        assert re.search(told, slzo_error(tensors_of, own(Scope, "tensors", returned), context))


def test_the_subset_of_a_scope_is_used_from_the_first_step():
    class OneOfAll(Scope):
        def tensors(self, context):
            return TunedTensors(dict(context.parts.model.named_parameters()))

        def subset(self, names, parts):
            return lambda seed, step: [names[step]]

        def describe(self):
            return "one tensor in each step"

    tensors = tensors_of(OneOfAll(), ScopeContext(ModelParts(tiny_model()), None))
    assert tensors.names_of_step(seed=0, step=2) == (tensors.names[2],)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"projected_grad": ()}, "no projected_grad"),
        ({"gradient": {}}, "no gradient for finite losses"),
        ({"gradient": {"other": torch.zeros(7)}}, "a gradient of 'other', which is not tuned"),
        ({"gradient": {"vector": torch.zeros(1)}}, "a gradient of 'vector' that is not float32 of shape (7,)"),
        ({"gradient": {"vector": torch.zeros(7).half()}}, "a gradient of 'vector' that is not float32 of shape (7,)"),
        (
            {"gradient": {"vector": torch.zeros(7, device="meta")}},
            "a gradient of 'vector' that is not a dense tensor on",
        ),
        ({"gradient": {"vector": torch.zeros(7).to_sparse()}}, "a gradient of 'vector' that is not a dense tensor on"),
        ({"gradient": None}, "Estimate("),
        ({"gradient": [torch.zeros(7)]}, "Estimate("),
        ({"loss": None}, "what is no number (float() argument"),
        ({"projected_grad": 1.0}, "what is no number ('float' object is not iterable"),
        ({"num_evaluations": None}, "what is no number (float() argument"),
    ],
)
def test_an_estimator_must_return_a_gradient_of_the_tuned_tensors(changes, told):
    quadratic = Quadratic()
    good = Estimate(1.0, 1.0, 1.0, (0.5,), 2, {"vector": torch.ones(7)})
    wrong = dataclasses.replace(good, **changes)
    context = EstimatorContext(quadratic.tuned, quadratic, seed=0, step=0)
    before = quadratic.tuned.clone_masters()
    optimizer = torch.optim.SGD(quadratic.tuned.masters, lr=1.0)
    line = slzo_error(take_step, context, own(SPSA, "estimate", wrong), optimizer)
    assert f"Own: estimate() returned {told}" in line
    assert "; it must return an Estimate" in line
    assert all(torch.equal(master, before[name]) for name, master in quadratic.tuned.named_masters().items())
    assert "returned no grad_norm;" in slzo_error(take_step, context, own(Backprop, "estimate", good), optimizer)
    take_step(context, own(SPSA, "estimate", good), optimizer)


def test_an_estimate_of_tensors_becomes_one_of_numbers():
    """A checkpoint could not hold them."""
    quadratic = Quadratic()
    context = EstimatorContext(quadratic.tuned, quadratic, seed=0, step=0)
    number = torch.tensor(0.5)
    given = Estimate(number, number, np.float32(0.5), torch.tensor([0.5]), number, {"vector": torch.ones(7)})
    found = estimate_of(own(SPSA, "estimate", given), context)
    assert (found.loss, found.loss_plus, found.loss_minus, found.projected_grad) == (0.5, 0.5, 0.5, (0.5,))
    values = (found.loss, found.loss_plus, found.loss_minus, *found.projected_grad, found.num_evaluations)
    assert {type(value) for value in values} == {float}


@pytest.mark.parametrize("returned", [None, ["x", "x"], [1.0], 1.0])
def test_an_objective_of_answers_must_return_a_number_for_each(returned):
    objective = own(AnswerObjective, "answer_losses", returned)
    loss = objective.loss(None, None)
    row = SimpleNamespace(example=None)
    line = slzo_error(loss.losses_of, [Answer("a", 1), Answer("b", 1)], [row, row])
    assert re.search(r"Own: answer_losses\(\) returned .*; it must return a number for each of the 2 answers", line)


@pytest.mark.parametrize(
    ("base", "method", "wrong"),
    [
        (SPSA, "estimate", lambda self: None),
        (SelectionRule, "select", lambda self, one, other: None),
        (Scope, "describe", lambda self, name: None),
        (Sst2, "example", lambda self, row: None),
        (AnswerObjective, "answer_losses", lambda self, answers, examples, *, more: None),
    ],
)
def test_a_method_with_wrong_arguments_is_refused_with_its_class(base, method, wrong):
    with pytest.raises(
        TypeError, match=rf"^Own\.{method}\(self.*\): slzo calls {method}\(self.*\); give the method these arg"
    ):
        type("Own", (base,), {method: wrong})


@pytest.mark.parametrize(
    "right",
    [
        lambda self, other_name: None,
        lambda self, context, more=1, *, other=2: None,
        lambda *given, **named: None,
        staticmethod(lambda context: None),
        torch.no_grad()(lambda self, context: None),
    ],
)
def test_a_method_may_have_further_arguments(right):
    own_class = type("Own", (SelectionRule,), {"select": right, "helper": lambda self: None})
    assert own_class().select(None) is None
    type("More", (own_class,), {"helper": lambda self, value: None})  # not a method of slzo


@pytest.mark.parametrize(
    ("method", "returned", "told"),
    [
        (
            "adapter",
            torch.nn.Linear(2, 2),
            r"Own: adapter\(\) returned Linear.*; it must return an slzo\.models\.adapters",
        ),
        ("changed_layers", 2, r"Own: changed_layers\(\) returned 2; it must return a list of numbers of layers"),
        ("changed_layers", ["2"], r"Own: changed_layers\(\) returned \['2'\]; it must return a list of numbers"),
        ("subset", ["x"], r"Own: subset\(\) returned \['x'\]; it must return a function of seed and step"),
        (
            "subset",
            lambda seed, step: ["x"],
            r"the function of subset\(\) returned \['x'\] for step 0; let it return a list",
        ),
        (
            "subset",
            lambda seed, step: None,
            r"the function of subset\(\) returned None for step 0; let it return a list",
        ),
    ],
)
def test_other_methods_of_a_scope_are_checked(method, returned, told):
    scope, context = own(LayerScope, method, returned), ScopeContext(ModelParts(tiny_model()), 1)
    checks = {"adapter": adapter_of, "changed_layers": changed_layers_of}

    def subset_of(scope, context):
        return tensors_of(scope, context).names_of_step(0, 0)

    assert re.search(told, slzo_error(checks.get(method, subset_of), scope, context))


@pytest.mark.parametrize("layers", [2, "last", [1.5]])
def test_wrong_layers_of_an_own_scope_are_named(layers):
    scope = own(Scope, "tensors", None)
    scope.layers = layers
    assert slzo_error(ZOModule, scope=scope).startswith(f"model.scope.layers {layers!r}: give a list of numbers")
