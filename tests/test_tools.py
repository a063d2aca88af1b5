"""Every tool starts as its docstring says: in a process of its own, without a path set by the tests."""

import os
import subprocess
import sys

import pytest
from helpers import ROOT

TOOLS = sorted(
    path.relative_to(ROOT) for folder in ("tools", "tools/research") for path in (ROOT / folder).glob("*.py")
)
WITHOUT_OPTIONS = {"tiny.py", "faults.py", "plain_training.py", "published_step.py", "docs_reference.py"}
WITHOUT_OPTIONS |= {"command_parsers.py"}


@pytest.mark.slow
@pytest.mark.parametrize("tool", [tool for tool in TOOLS if tool.name not in WITHOUT_OPTIONS], ids=str)
def test_a_tool_prints_its_help(tool):
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, str(tool), "--help"], cwd=ROOT, env=alone, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("usage:")
