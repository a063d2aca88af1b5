"""Facts about the running process."""

import ctypes
import os
import resource
import sys
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed

_Item = TypeVar("_Item")
_CGROUPS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory used so far, GiB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    # on Linux this one can be that of the process that started this one
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def free_bytes(device: torch.device) -> int | None:
    """Memory that is free on a device; ``None`` where it is not known."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    status = Path("/proc/meminfo")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    for path in map(Path, _CGROUPS):
        limit = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
        if limit != "max":
            found.append(int(limit))
    return min(found, default=None)


def of_all_processes(items: list[_Item]) -> list[_Item]:
    """The items of every process, in the order of the processes; a collective call where there are several."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return items
    gathered: list[list[_Item]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor instead of giving it back to the system page by page.

    A forward pass on the CPU makes and drops tensors of some megabytes all the time; with glibc's defaults every one of them is
    mapped and zeroed anew, which takes about a quarter of a step. A setting of the whole process, so only programs should call
    it, not libraries. Returns whether the C library took the settings; other libraries than glibc have none.
    """
    if not sys.platform.startswith("linux"):
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # from malloc.h
    settings = ((m_mmap_threshold, 32 * 2**20), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 * 2**20))
    return all(mallopt(option, value) == 1 for option, value in settings)


def bound_kernel_caches() -> None:
    """Keep the kernels that oneDNN compiles for the last shapes only.

    Every batch has another number of tokens, so a run asks for thousands of shapes and comes back to few. oneDNN and torch's
    layer above it each keep the last 1024 kernels, up to half a GiB; a shape that returns within a step is still among 64. What
    the environment says already is left as it is. For programs, as :func:`keep_freed_memory`, and before the first product.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "64")
