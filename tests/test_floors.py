"""Imports between packages only go down, and few packages import Lightning."""

import ast
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

pytestmark = pytest.mark.fast

PACKAGE = Path(__file__).parents[1] / "slzo"
# from the top; a room imports from floors below its own, never from a neighbour
FLOORS = [
    ["__main__", "commands", "__init__"],  # __init__ imports three classes when they are used
    ["cli"],
    ["lightning"],
    ["datamodule", "fit", "prompting"],
    ["experiments", "export"],
    ["training", "report"],
    ["task_data"],
    ["zo"],
    ["evaluation"],
    ["data"],
    ["models", "tasks", "checkpoints"],
    ["batches", "rewards", "plots", "private", "commands.registry"],
    ["utils", "version"],
]
LEVEL = {room: level for level, floor in enumerate(FLOORS) for room in floor}
WITH_LIGHTNING = {"cli", "lightning", "datamodule"}
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_utilities")
ROOMS = {
    "slzo": "__init__",
    "slzo.commands.registry": "commands.registry",  # known before torch is loaded
    "slzo.callbacks": "lightning",  # callbacks, module and trainer know each other
    "slzo.module": "lightning",
}


def room_of(module):
    """``slzo.zo.noise`` is in the room ``zo``."""
    package = ".".join(module.split(".")[:2])
    return ROOMS.get(module) or ROOMS.get(package) or package.removeprefix("slzo.")


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path):
    """Modules that a file imports, inside functions too; names of a package become its files."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in FILES} or {node.module}
    return found


@pytest.fixture(scope="module")
def imports():
    """The imported modules of each file."""
    return {name: imports_of(path) for name, path in FILES.items()}


@pytest.fixture(scope="module")
def pairs(imports):
    return [(name, other) for name, imported in imports.items() for other in sorted(imported)]


def test_every_room_is_on_a_floor():
    assert {room_of(name) for name in FILES} == set(LEVEL)
    assert len(LEVEL) == sum(map(len, FLOORS))
    assert len(FLOORS) <= 14


def test_imports_go_down_only(pairs):
    rooms = [(name, other, room_of(name), room_of(other)) for name, other in pairs if other in FILES]
    assert len(rooms) > 500
    assert not [f"{name} -> {other}" for name, other, a, b in rooms if a != b and LEVEL[b] <= LEVEL[a]]


def test_no_circle_between_files(imports):
    graph = {name: {other for other in imported if other in FILES} for name, imported in imports.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_few_rooms_know_lightning(pairs):
    found = {name: other for name, other in pairs if other.split(".")[0] in LIGHTNING}
    assert {room_of(name) for name in found} - {"private"} == WITH_LIGHTNING, found
    assert [name for name in found if room_of(name) == "private"] == ["slzo.private.lightning"]
