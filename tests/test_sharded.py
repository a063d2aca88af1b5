"""Layers that processes share: the same values and results, half of the memory, and any number of runs on each process."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest


def on_ranks(number, *arguments):
    """What each process of ``sharded_rank.py`` saw."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    script = Path(__file__).parent / "sharded_rank.py"
    settings = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(number), "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen(
            [sys.executable, str(script), *map(str, arguments)],
            env={**os.environ, **settings, "RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(number)
    ]
    try:
        done = [rank.communicate(timeout=120) for rank in ranks]
    finally:  # a process that waits for another would wait for half an hour
        for rank in ranks:
            rank.kill()
    for rank, (_, errors) in zip(ranks, done, strict=True):
        assert rank.returncode == 0, errors[-3000:]
    return [json.loads(output.splitlines()[-1]) for output, _ in done]


def test_processes_share_layers_whatever_each_of_them_runs(model_dir):
    for found in on_ranks(2, model_dir):
        assert found.pop("share") == pytest.approx(0.5, abs=0.01)
        assert found.pop("error") < 1e-5
        assert all(found.values()), found


@pytest.mark.slow
def test_three_processes_divide_tensors_unevenly(model_dir):
    shares = []
    for found in on_ranks(3, model_dir):
        shares.append(found.pop("share"))
        assert found.pop("error") < 1e-5
        assert all(found.values()), found
    assert sum(shares) == pytest.approx(1)
