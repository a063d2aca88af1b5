import subprocess
import sys

import pytest
import torch

from slzo.runtime import keep_freed_memory, peak_memory_gb


def test_peak_memory_is_that_of_the_process():
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 100


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept_and_not_mapped_again():
    """Making a tensor of 8 MB again and again costs no page faults, in a process of its own."""
    code = (
        "import resource, torch; from slzo.runtime import keep_freed_memory; assert keep_freed_memory()\n"
        "for _ in range(3): torch.ones(2_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(2_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000  # one pass of faults is about 2000, twenty would be 40000


def test_other_systems_are_left_alone(monkeypatch):
    monkeypatch.setattr(sys, "platform", "darwin")
    assert keep_freed_memory() is False
