"""Several processes on one folder of results: each cell is computed once, and that of a lost process by another."""

import json
import os
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch

from slzo.experiments.store import CellStore
from slzo.experiments.workers import workers
from slzo.utils.console import is_worker
from slzo.utils.errors import SlzoError


def test_all_cells_are_computed_and_those_of_a_process_that_ended_too(tmp_path, monkeypatch):
    """Another process has one cell, ends without a result, and another one finishes its cell while this one waits."""
    store, other = (CellStore(tmp_path / "s", {}) for _ in range(2))
    lost, slow = other.claim("b"), other.claim("c")
    assert lost.__enter__()
    assert slow.__enter__()
    reported = []

    def wait(seconds):
        if other.result("c") is None:
            other.save("c", {"value": "other"})
            slow.__exit__(None, None, None)
        else:
            lost.__exit__(None, None, None)

    monkeypatch.setattr("slzo.experiments.store.time.sleep", wait)
    store.complete(
        {name: partial(dict, value=name) for name in "abc"}, lambda name, result: reported.append((name, result))
    )
    assert reported == [("a", {"value": "a"}), ("b", {"value": "b"})]
    assert [store.result(name)["value"] for name in "abc"] == ["a", "b", "other"]


def test_workers_run_the_command_and_end_with_it(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1, 2})
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,5")
    program = (
        "import os, pathlib, time; pathlib.Path(os.environ['SLZO_WORKER']).write_text("
        "os.environ['OMP_NUM_THREADS'] + ' ' + os.environ['CUDA_VISIBLE_DEVICES'])"
    )
    threads = torch.get_num_threads()
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", f"{program}; time.sleep(600)"])
    with workers(3):
        assert torch.get_num_threads() == 1
        deadline = time.monotonic() + 60
        expected = {"1": "1 5", "2": "1 2"}  # threads, and a card of those that this process has
        while {p.name: p.read_text(encoding="utf-8") for p in tmp_path.glob("[12]")} != expected:
            assert time.monotonic() < deadline
            time.sleep(0.05)
    assert torch.get_num_threads() == threads
    monkeypatch.setattr(sys, "orig_argv", ["python", "-c", "raise SystemExit(3)"])
    with workers(2):
        time.sleep(1)
    assert "worker 1 ended early with status 3" in capsys.readouterr().err
    with pytest.raises(SlzoError, match="workers 4: each worker needs a core of its own, and there are 3"), workers(4):
        pass


@pytest.mark.slow
def test_a_sweep_with_two_workers_has_the_results_of_one(options):
    common = ["sweep", *options, "--directions=20", "--layers=[1,2]", "--steps=2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    for name, own in (("one", []), ("two", ["--workers=2"]), ("worker", [])):
        environment |= {"SLZO_WORKER": "1"} if name == "worker" else {}
        command = [sys.executable, "-m", "slzo", *common, f"--output={name}", *own]
        done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        assert done.returncode == 0, done.stderr
    assert not Path("worker/sweep.json").exists()  # a worker leaves the report to the process that started it
    one, two = (json.loads(Path(name, "sweep.json").read_text(encoding="utf-8")) for name in ("one", "two"))
    assert [row["loss"] for row in one["layers"]] == [row["loss"] for row in two["layers"]]


def test_a_worker_starts_no_others(monkeypatch):
    assert not is_worker()
    monkeypatch.setenv("SLZO_WORKER", "1")
    assert is_worker()
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    monkeypatch.setattr("slzo.experiments.workers.subprocess.Popen", lambda *_, **__: pytest.fail("started"))
    with workers(2):
        pass
