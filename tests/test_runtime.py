"""Memory and kernel caches of the process."""

import os
import subprocess
import sys

import pytest
import torch

from slzo.private.modules import has_onednn_linear
from slzo.utils import runtime
from slzo.utils.runtime import free_bytes, peak_memory_gb


def test_peak_memory_is_that_of_the_process():
    assert 0.05 < peak_memory_gb(torch.device("cpu")) < 100


@pytest.mark.slow
def test_peak_memory_is_not_that_of_the_parent():
    code = "import torch; from slzo.utils.runtime import peak_memory_gb; print(peak_memory_gb(torch.device('cpu')))"
    held = torch.ones(2**28)  # 1 GiB
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 0.9
    del held


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="a setting of glibc")
def test_freed_memory_is_kept_and_not_mapped_again():
    """Making a tensor of 8 MB again and again costs no page faults, in a process of its own."""
    code = (
        "import resource, torch; from slzo.utils.runtime import keep_freed_memory; keep_freed_memory()\n"
        "for _ in range(3): torch.ones(2_000_000)\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt\n"
        "for _ in range(20): torch.ones(2_000_000)\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert int(done.stdout) < 2000  # one pass of faults is about 2000, twenty would be 40000


@pytest.mark.slow
@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.skipif(not has_onednn_linear(), reason="this torch has no oneDNN")
def test_kernels_of_former_shapes_are_forgotten():
    """Products of 600 shapes, in processes of their own: with every kernel kept they take several times the memory."""
    code = (
        "import sys, torch; from slzo.utils.runtime import bound_kernel_caches\n"
        "if sys.argv[1] == 'bound': bound_kernel_caches()\n"
        "def used(): return int(open('/proc/self/status').read().split('RssAnon:')[1].split()[0])\n"
        "torch.set_num_threads(1); before = used()\n"
        "weight = torch.zeros(512, 256)\n"
        "for rows in range(100, 700): torch.ops.mkldnn._linear_pointwise(torch.zeros(rows, 256), weight, None, 'none', [], '')\n"
        "print(used() - before)"
    )

    def grown(how):
        environment = {name: value for name, value in os.environ.items() if not name.endswith("CACHE_CAPACITY")}
        command = [sys.executable, "-c", code, how]
        return int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)

    assert grown("bound") < grown("free") / 2


def test_memory_that_pytorch_keeps_for_new_tensors_is_free(monkeypatch):
    for name, value in {"mem_get_info": (100, 900), "memory_reserved": 50, "memory_allocated": 20}.items():
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_bytes(torch.device("cuda")) == 130


def test_in_a_container_its_limit_counts_less_what_is_used(tmp_path, monkeypatch):
    for name, text in {
        "memory.max": "3000000\n",
        "memory.current": "2000000\n",
        "memory.stat": "anon 1\ninactive_file 500000\n",
    }.items():
        (tmp_path / name).write_text(text)
    limit = str(tmp_path / "memory.max")
    monkeypatch.setattr(runtime, "_CGROUPS", ((limit, "memory.current", "inactive_file"),))
    assert free_bytes(torch.device("cpu")) == 1_500_000
    (tmp_path / "memory.max").write_text("max\n")
    assert free_bytes(torch.device("cpu")) > 1_500_000
