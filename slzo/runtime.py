"""Facts about the running process."""

import resource
import sys

import torch


def peak_memory_gb(device: torch.device) -> float:
    """Largest memory used so far, GiB: of the accelerator, or of the process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**30 if sys.platform == "darwin" else peak / 2**20
