"""Private names of Lightning and jsonargparse are used in ``slzo/private`` only, and work in the installed versions."""

import ast
from pathlib import Path

import pytest
from jsonargparse import ArgumentParser

from slzo.private.parsers import options_of, type_of

PACKAGE = Path(__file__).parents[1] / "slzo"
LIBRARIES = ("lightning", "jsonargparse")


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


def is_private(name):
    return name.startswith("_") and not name.startswith("__")


def modules(node):
    if isinstance(node, ast.Import):
        return [alias.name for alias in node.names]
    return [f"{node.module}.{alias.name}" for alias in node.names] if isinstance(node, ast.ImportFrom) else []


def named_attribute(node):
    """The attribute that ``getattr`` or ``setattr`` is given as a text."""
    is_call = isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("getattr", "setattr")
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
    found += [ast.unparse(node) for node in attributes if node.attr not in own]
    found += [name for name in map(named_attribute, nodes) if is_private(name)]
    return [name for name in found if not name.startswith("torch.")]


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
    ],
)
def test_the_check_sees_a_private_name(code):
    assert private_names(code)


def test_own_names_and_those_of_other_libraries_are_allowed():
    own = "class A:\n    def _f(self):\n        self._x = self._f()\n        return self._x"
    assert private_names(f"import lightning\n{own}\ntorch.nn._x") == []
    assert private_names("import torch\nmodel._x") == []
