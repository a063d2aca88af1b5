"""Memory and settings of the running process."""

import ctypes
import os
import re
import resource
from contextlib import suppress
from pathlib import Path

import torch

# memory of a container, cgroup versions 2 and 1: limit, usage, and the entry of memory.stat with cached files that can be dropped
_CGROUPS = (
    ("/sys/fs/cgroup/memory.max", "memory.current", "inactive_file"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)


def peak_memory_gb(device: torch.device) -> float:
    """Return the peak memory so far, GiB, of the accelerator or, on a CPU, of the process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if (peak := _kilobytes("/proc/self/status", "VmHWM")) is None:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # can be that of the parent process
    return peak / 2**20


def free_bytes(device: torch.device) -> int | None:
    """Return the free memory of a device, in bytes; ``None`` if it is unknown."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(
            device
        )  # kept by PyTorch for new tensors
        return torch.cuda.mem_get_info(device)[0] + unused
    available = _kilobytes("/proc/meminfo", "MemAvailable")
    found = [] if available is None else [available * 1024]
    for name, usage, cached in _CGROUPS:
        path = Path(name)
        limit = path.read_text(encoding="utf-8").strip() if path.is_file() else "max"
        if limit != "max":
            stat = dict(line.split() for line in path.with_name("memory.stat").read_text(encoding="utf-8").splitlines())
            used = int(path.with_name(usage).read_text(encoding="utf-8"))
            found.append(max(0, int(limit) - used + int(stat[cached])))
    return min(found, default=None)


def _kilobytes(file: str, name: str) -> int | None:
    """Return an entry of a file in /proc, KiB; ``None`` if it is not there."""
    with suppress(OSError):  # a container may not show it
        line = re.search(rf"^{name}:\s+(\d+)", Path(file).read_text(encoding="utf-8"), re.MULTILINE)
        return None if line is None else int(line[1])
    return None


def keep_freed_memory() -> None:
    """Let the C library keep freed memory for the next tensor instead of returning it to the system.

    A forward pass on the CPU allocates and frees tensors of some megabytes all the time. With glibc's defaults each of them is
    mapped and zeroed again, which takes about a quarter of a step. This is a setting of the whole process, so only programs
    should call it, not libraries. C libraries other than glibc lack it.
    """
    m_trim_threshold, m_top_pad, m_mmap_threshold = -1, -2, -3  # from malloc.h
    with suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((m_mmap_threshold, 32 * 2**20), (m_trim_threshold, 2**31 - 1), (m_top_pad, 64 * 2**20)):
            mallopt(option, value)


def bound_kernel_caches() -> None:
    """Limit oneDNN's cache of compiled kernels to the last 64 shapes.

    Each batch has a different number of tokens, so a run needs thousands of shapes and repeats few. By default oneDNN and torch
    each keep the last 1024 kernels, up to half a GiB. A cache of 64 still has the shapes that repeat within a step. Variables
    that are already set are kept. Call it in programs only, like :func:`keep_freed_memory`, before the first matrix product.
    """
    for variable in ("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "LRU_CACHE_CAPACITY"):
        os.environ.setdefault(variable, "64")
