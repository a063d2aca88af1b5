"""Memory and settings of the running process."""

import ctypes
import gc
import os
import resource
import sys
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed

_Item = TypeVar("_Item")
# of a container, versions 2 and 1: limit, usage, and the entry of memory.stat with cached files that can be dropped
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far, GiB, of the accelerator or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    status = Path("/proc/self/status")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 2**20
    # on Linux this can be the peak of the parent process
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, in bytes; ``None`` if it is unknown."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    found = []
    status = Path("/proc/meminfo")
    for line in status.read_text(encoding="utf-8").splitlines() if status.is_file() else ():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            found.append(int(value.split()[0]) * 1024)
    for name, usage, cached in _CGROUPS:
        path = Path(name)
        limit = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
        if limit != "max":
            stat = dict(line.split() for line in path.with_name("memory.stat").read_text(encoding="utf-8").splitlines())
            used = int(path.with_name(usage).read_text(encoding="utf-8"))
            found.append(max(0, int(limit) - used + int(stat[cached])))
    return min(found, default=None)


def gather_from_processes(items: list[_Item]) -> list[_Item]:
    """Gather the items of all processes, in the order of the processes; a collective operation."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return items
    gathered: list[list[_Item]] = [[] for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather_object(gathered, items)
    return [item for part in gathered for item in part]


def leave_process_group() -> None:
    """Disconnect from the other processes of a run, when no exchange with them is under way.

    It waits for the threads that exchange tensors. If such a thread released a tensor while the interpreter ends, it would abort
    the process (pytorch/pytorch#190489).
    """
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()
        gc.collect()  # the threads end with the last reference to the group


def keep_freed_memory() -> bool:
    """Let the C library keep freed memory for the next tensor instead of returning it to the system.

    A forward pass on the CPU allocates and frees tensors of some megabytes all the time. With glibc's defaults each of them is
    mapped and zeroed again, which takes about a quarter of a step. This is a setting of the whole process, so only programs
    should call it, not libraries. Returns whether the settings were applied; C libraries other than glibc lack them.
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
    """Limit oneDNN's cache of compiled kernels to the last 64 shapes.

    Each batch has another number of tokens, so a run needs thousands of shapes and repeats few. By default oneDNN and torch each
    keep the last 1024 kernels, up to half a GiB. A cache of 64 still has the shapes that repeat within a step. Variables that are
    already set are kept. Call it in programs only, like :func:`keep_freed_memory`, before the first matrix product.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "64")
