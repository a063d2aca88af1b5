"""Every tool starts as its docstring says: in a process of its own, without a path set by the tests."""

import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT

import plain_training
from options import option, parse
from slzo.experiments.store import CellStore
from tables import finished, markdown_table

TOOLS = sorted(
    path.relative_to(ROOT) for folder in ("tools", "tools/research") for path in (ROOT / folder).glob("*.py")
)
WITHOUT_OPTIONS = {
    f"{name}.py"
    for name in (
        "tiny",
        "faults",
        "published_step",
        "docs_reference",
        "command_parsers",
        "slzo_step",
        "options",
        "measuring",
        "loading",
        "tables",
    )
}


@pytest.mark.slow
@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.name not in WITHOUT_OPTIONS], ids=str)
def test_a_tool_prints_its_help(tool):
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(tool), "--help"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage:")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a tool that does not exist."""

    data_dir: str = option(help="folder")
    layers: list[int] = option([2, 28], "layers")
    methods: list[str] = option(["spsa"], choices=["spsa", "exact"])
    report: bool = option(False)


def test_options_are_the_fields_of_a_dataclass(capsys):
    assert parse(Options, "", ["--data_dir", "x"]) == Options(data_dir="x")
    words = ["--data_dir=x", "--layers", "1", "3", "--methods", "exact", "--report"]
    assert parse(Options, "", words) == Options(data_dir="x", layers=[1, 3], methods=["exact"], report=True)
    for wrong in ([], ["--data_dir=x", "--methods", "mezo"], ["--data_dir=x", "--steps=3"]):
        with pytest.raises(SystemExit):
            parse(Options, "", wrong)
    with pytest.raises(SystemExit):
        parse(Options, "A table.\n\n    python tools/x.py", ["--help"])
    shown = capsys.readouterr().out
    assert "\nA table.\n\n    python tools/x.py\n" in shown
    assert "layers (default: 2 28)" in shown


def test_cells_are_computed_once(tmp_path):
    def results(*cells, report=False):
        computed = []
        store = CellStore(tmp_path / "out", {})
        found = finished(store, cells, lambda cell: {"cell": len(computed.append(cell) or computed)}, report)
        return computed, [cell for cell, _ in found]

    first, second = ("models/a.gguf", "sst2", None), ("b", "sst2", 3)
    assert results(first) == ([first], [first])
    assert results(second, first, report=True) == ([], [first])
    assert results(second, first) == ([second], [second, first])
    assert sorted(path.name for path in (tmp_path / "out" / "cells").glob("*.json")) == ["a-sst2.json", "b-sst2-3.json"]


def test_a_table_in_markdown():
    assert markdown_table(["task", "rows"], [["sst2", 3]]) == "| task | rows |\n|---|---:|\n| sst2 | 3 |"


def test_a_wrong_task_of_a_plain_training_is_one_line(capsys):
    assert plain_training.main(["--task=sst9", "--data_dir=nowhere", "--method=mezo"]) == 2
    assert capsys.readouterr().err.startswith("plain_training: error: data.task 'sst9': unknown task")
