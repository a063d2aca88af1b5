"""The packages stand on floors: imports go down only, and below a line there is no Lightning."""

import ast
from graphlib import CycleError, TopologicalSorter
from itertools import pairwise
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "slzo"
# from the top; a room may import from the rooms below it, never from its own floor's others or above
FLOORS = [
    ["__main__"],
    ["cli_completion"],
    ["cli", "prompting"],
    ["run_trainer"],
    ["cli_auto", "cli_errors", "cli_help", "config_files", "constructor_errors", "trainer"],
    ["base_scores", "callbacks", "checkpoint_io", "folder_logger", "run_folder"],
    ["experiments"],
    ["module"],
    ["datamodule"],
    ["console", "trainer_checks"],
    # no Lightning from here on
    ["export", "report"],
    ["zo"],
    ["checkpoint_names", "evaluation"],
    ["data", "models", "checkpoint"],
    ["batches"],
    ["tasks"],
    ["rewards"],
    ["assets", "pictures"],
    [
        "pip_download",
        "renames",
        "class_paths",
        "settings",
        "seeding",
        "runtime",
        "environment",
        "commands",
        "files",
        "checkpoint_file",
        "checkpoint_note",
        "step_log",
    ],
    ["errors", "signals", "__init__"],
]
LIGHTNING_ENDS = FLOORS.index(["console", "trainer_checks"])
LIGHTNING = ("lightning", "pytorch_lightning", "lightning_utilities")


def room_of(module):
    """``slzo.zo.noise`` is in the room ``zo``, ``slzo`` itself is ``__init__``."""
    return module.split(".")[1] if "." in module else "__init__"


def name_of(path):
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def imports_of(path):
    """Modules that a file imports, those inside functions and type checks too; a package's own names become its files."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if name in FILES} or {node.module}
    return found


IMPORTS = {name: imports_of(path) for name, path in FILES.items()}


def test_every_room_is_on_a_floor():
    rooms = {room_of(name) for name in FILES}
    assert rooms == {room for floor in FLOORS for room in floor}


def test_imports_go_down_only():
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    wrong = [
        f"{name} -> {other}"
        for name, imported in IMPORTS.items()
        for other in imported
        if other.startswith("slzo")
        and room_of(other) != room_of(name)
        and level[room_of(other)] <= level[room_of(name)]
    ]
    assert not wrong


def test_no_circle_between_files():
    # a package imports its own files to list them, and they take nothing from the list
    graph = {name: {other for other in imported if other in FILES} for name, imported in IMPORTS.items()}
    try:
        list(TopologicalSorter(graph).static_order())
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_no_lightning_below_its_floor():
    below = {room for floor in FLOORS[LIGHTNING_ENDS + 1 :] for room in floor}
    wrong = [
        f"{name} -> {other}"
        for name, imported in IMPORTS.items()
        for other in imported
        if room_of(name) in below and other.split(".")[0] in LIGHTNING
    ]
    assert not wrong


def test_the_check_sees_a_circle_and_a_step_up():
    level = {room: number for number, floor in enumerate(FLOORS) for room in floor}
    assert all(level[upper[0]] < level[lower[0]] for upper, lower in pairwise(FLOORS))
    with pytest.raises(CycleError):
        list(TopologicalSorter({"a": {"b"}, "b": {"a"}}).static_order())
    assert imports_of(Path(__file__)) >= {"ast", "pytest", "graphlib"}
