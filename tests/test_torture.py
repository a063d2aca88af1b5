"""A short torture: runs that are killed and interrupted end as uninterrupted ones."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from torture import Outcome, report

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
def test_nothing_is_lost(tmp_path):
    trials = 30
    result = tmp_path / "outcomes.json"
    # a process of its own: it forks, and other tests have started threads
    command = [sys.executable, "tools/torture.py", f"--trials={trials}", "--seed=1", f"--json={result}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment, timeout=1500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-1000:]
    outcomes = json.loads(result.read_text())
    assert len(outcomes) == trials
    assert sum(len(outcome["faults"]) for outcome in outcomes) >= trials / 2


def test_the_table_counts_what_is_not_as_it_should_be():
    outcomes = [
        Outcome("fit", ["SIGKILL", "SIGINT"]),
        Outcome("fit", [], same=False, lost=3),
        Outcome("edited", ["SIGKILL"], accepted=1),
        Outcome("sweep", ["SIGTERM"]),
    ]
    assert [outcome.bad for outcome in outcomes] == [False, True, True, False]
    assert report(outcomes).splitlines()[2:] == [
        "| fit | 2 | 2 | 1 | 0 | 0 | 0 | 3 | 0 |",
        "| edited | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 1 |",
        "| sweep | 1 | 1 | 0 | 0 | 0 | 0 | 0 | 0 |",
    ]
