"""Every tool starts as its docstring says: in a process of its own, without a path set by the tests."""

import os
import re
import subprocess
import sys
from dataclasses import dataclass

import pytest
from helpers import ROOT

import benchmark_evaluation
import llama_cpp_check
import memory_and_time
import methods_at_equal_time
import plain_training
import rewards_by_default
import zero_shot_table
from options import command, option, parse
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


def test_ctrl_c_ends_a_tool_in_one_line(capsys):
    @command
    def main(argv):
        raise KeyboardInterrupt

    assert main() == 130
    assert capsys.readouterr().err == "test_tools: interrupted\n"


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


@pytest.mark.parametrize(
    ("tool", "options", "expected"),
    [
        (plain_training, ["--task=sst9", "--method=mezo"], "data.task 'sst9': unknown task"),
        (benchmark_evaluation, ["--tasks", "sst2:all"], "--tasks 'sst2:all': give TASK:ROWS"),
        (methods_at_equal_time, ["--layers", "middle"], "--layers 'middle': choose removing, last, first, or"),
    ],
)
def test_a_wrong_option_of_a_tool_is_one_line(tool, options, expected, capsys):
    assert tool.main(["--data_dir=nowhere", *options]) == 2
    assert capsys.readouterr().err.startswith(f"{tool.__name__}: error: {expected}")


def test_llama_cpp_without_its_rows_or_its_package_is_one_line(tmp_path, monkeypatch, capsys):
    rows = tmp_path / "rows.jsonl"
    options = ["--folder=tuned", "--gguf=tuned.gguf", f"--rows={rows}"]
    assert llama_cpp_check.main(options) == 2
    assert capsys.readouterr().err.startswith(f"llama_cpp_check: error: '{rows}': does not exist")
    rows.write_text('{"prompt": "It was"}\n')
    monkeypatch.setitem(sys.modules, "xllamacpp", None)
    assert llama_cpp_check.main(options) == 2
    assert capsys.readouterr().err == "llama_cpp_check: error: xllamacpp: is not installed; run pip install xllamacpp\n"


def test_methods_are_compared_in_layers_that_no_rule_chooses(model_dir, data_dir, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(methods_at_equal_time, "ROWS", {"sst2": (16, 8, 4)})
    paths = [f"--data_dir={data_dir}", f"--output={tmp_path / 'cells'}", "--models", str(model_dir)]
    assert methods_at_equal_time.main([*paths, "--methods", "output", "--seconds=0.1", "--layers", "last", "1"]) == 0
    assert [line.split(" | ")[2] for line in capsys.readouterr().out.splitlines()[-2:]] == ["last (3)", "1 (1)"]


@pytest.mark.parametrize(("status", "kept"), [(130, False), (2, True)])
def test_a_signal_ends_the_comparison_of_rewards_without_a_result(status, kept, tmp_path, monkeypatch):
    monkeypatch.setattr(rewards_by_default, "slzo", lambda _: status)
    options = [f"--output={tmp_path / 'out'}", "--rewards", "length", "--objectives", "reward"]
    if kept:
        assert rewards_by_default.main(options) == 0
    else:
        with pytest.raises(SystemExit, match="130"):
            rewards_by_default.main(options)
    assert len(list(tmp_path.glob("out/cells/cells/*.json"))) == kept


def test_the_memory_and_the_seconds_of_slzo_are_measured(model_dir, data_dir):
    found = memory_and_time.fit(memory_and_time.Cell(str(model_dir), "sst2", 2, "slzo", 2), str(data_dir))
    assert set(found) == {"planned", "peak", "seconds"}
    assert min(found.values()) > 0


def test_the_page_of_zero_shot_scores_is_what_its_tool_writes():
    page = (ROOT / "docs/zero_shot.md").read_text(encoding="utf-8")
    head, _, *rows = [re.split(r" ?\| ?", line.strip("|\n ")) for line in page.splitlines() if line.startswith("|")]
    scores = {
        task: {"n": count} | {name: float(value) for name, value in zip(head[2:], values, strict=False) if value}
        for task, count, *values in rows
    }
    assert zero_shot_table.page(scores, "smollm2-135m") == page
