"""Private names of other libraries are used in ``slzo/private`` only, and work in the installed versions."""

import ast
from pathlib import Path

import pytest
import torch
from accelerate.hooks import AlignDevicesHook, add_hook_to_module
from jsonargparse import ArgumentParser
from lightning import Trainer
from torch import nn
from torch.optim.lr_scheduler import ChainedScheduler, LinearLR, SequentialLR
from transformers import LlamaConfig, LlamaForCausalLM

from slzo.private.lightning import copies_process
from slzo.private.models import (
    arguments_of_any_device,
    attention_of,
    can_replace_attention,
    device_hook_of,
    model_from_config,
)
from slzo.private.modules import copy_modules, nested_schedulers, onednn_linear, with_submodule
from slzo.private.parsers import options_of, type_of

pytestmark = pytest.mark.fast

PACKAGE = Path(__file__).parents[1] / "slzo"
LIBRARIES = ("lightning", "jsonargparse", "torch", "transformers", "accelerate")
NAMED_TUPLE = ("_replace", "_asdict", "_fields")  # public, whatever their names


class Engine:
    def __init__(self, cache: float = 1.0, name: str | None = None):
        pass


def test_options_of_a_parser_and_their_types():
    parser = ArgumentParser()
    parser.add_argument("--count", type=int | None)
    parser.add_argument("--plain", type=str)
    parser.add_class_arguments(Engine, "engine")
    found = {option.dest: type_of(option) for option in options_of(parser)}
    assert found["count"] == int | None
    assert found["plain"] is str
    assert (found["engine.cache"], found["engine.name"]) == (float, str | None)


def test_a_model_is_made_of_its_class_and_its_attention_read_and_set():
    config = LlamaConfig(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, vocab_size=8)
    model = model_from_config(LlamaForCausalLM, config, torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert can_replace_attention(model)
    model.set_attn_implementation("eager")
    assert attention_of(model) == "eager"


def test_a_copied_tree_shares_all_but_what_is_replaced():
    tree = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2)))
    clone = copy_modules(tree, lambda module: nn.ReLU() if isinstance(module, nn.Linear) else None)
    assert isinstance(clone[0], nn.ReLU)
    assert isinstance(tree[0], nn.Linear)
    assert clone[1][0] is not tree[1][0]
    assert clone[1][0].weight is tree[1][0].weight


def test_a_product_through_onednn_is_that_of_torch():
    linear, inputs = nn.Linear(8, 4), torch.randn(3, 8)
    with torch.no_grad():
        torch.testing.assert_close(onednn_linear(inputs, linear.weight, linear.bias), linear(inputs))


def test_a_tree_is_copied_with_another_submodule():
    tree = nn.Sequential(nn.Linear(2, 2), nn.Sequential(nn.LayerNorm(2), nn.ReLU()))
    clone = with_submodule(tree, "1.0", nn.Identity())
    assert isinstance(clone[1][0], nn.Identity)
    assert isinstance(tree[1][0], nn.LayerNorm)
    assert clone[0] is tree[0]
    assert clone[1][1] is tree[1][1]


def test_a_hook_of_a_device_map_is_found():
    model = nn.Linear(2, 2)
    assert device_hook_of(model) is None
    hook = AlignDevicesHook("cpu")
    add_hook_to_module(model, hook)
    assert device_hook_of(model) is hook
    assert arguments_of_any_device(LlamaForCausalLM)


def test_nested_schedulers_are_found():
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))])
    inner = [LinearLR(optimizer), LinearLR(optimizer)]
    sequential = SequentialLR(optimizer, inner, [2])
    assert nested_schedulers(ChainedScheduler([sequential]))[1:] == [sequential, *inner]


@pytest.mark.parametrize(("strategy", "copies"), [("ddp", False), ("ddp_spawn", True), ("ddp_fork", True)])
def test_strategies_that_copy_the_process(strategy, copies):
    trainer = Trainer(strategy=strategy, devices=2, accelerator="cpu", logger=False, enable_checkpointing=False)
    assert copies_process(trainer.strategy.launcher) is copies


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def named_attribute(node):
    """The attribute that ``getattr``, ``setattr`` or ``hasattr`` is given as a text."""
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr", "hasattr")
    return str(node.args[1].value) if is_call and isinstance(node.args[1], ast.Constant) else ""


def private_names(code):
    """Private names that a file which imports the libraries uses and does not define itself."""
    nodes = list(ast.walk(ast.parse(code)))
    imported = [name for node in nodes for name in modules(node) if name.split(".")[0] in LIBRARIES]
    if not imported:
        return []
    attributes = [node for node in nodes if isinstance(node, ast.Attribute) and is_private(node.attr)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {
        node.attr for node in attributes if isinstance(node.ctx, ast.Store) and getattr(node.value, "id", "") == "self"
    }
    found = [name for name in imported if any(map(is_private, name.split(".")))]
    found += [ast.unparse(node) for node in attributes if node.attr not in own and node.attr not in NAMED_TUPLE]
    found += [name for name in map(named_attribute, nodes) if is_private(name)]
    found += [node.arg for node in nodes if isinstance(node, ast.keyword) and is_private(node.arg or "")]
    return found


def test_no_private_name_outside_of_its_folder():
    files = [path for path in PACKAGE.rglob("*.py") if path.parent.name != "private"]
    found = {str(path.relative_to(PACKAGE)): private_names(path.read_text(encoding="utf-8")) for path in files}
    assert not {name: names for name, names in found.items() if names}


@pytest.mark.parametrize(
    "code",
    [
        "from lightning.pytorch.loops import _x",
        "from lightning._x import y",
        "import jsonargparse._x",
        "import lightning\ntrainer._x = 1\nprint(trainer._x)",
        "import lightning\nclass A(lightning.LightningModule):\n    def f(self):\n        return self._trainer",
        "import jsonargparse\ngetattr(parser, '_x')",
        "import torch\nhasattr(torch.ops, '_x')",
        "from torch import nn\nnn._x",
        "import transformers\nmodel._x()",
        "import transformers\nmodel.x(_y=1)",
    ],
)
def test_the_check_sees_a_private_name(code):
    assert private_names(code)


def test_own_names_are_allowed():
    own = "class A:\n    def _f(self):\n        self._x = self._f()\n        return self._x"
    assert private_names(f"import lightning\n{own}") == []
