"""Describe software and hardware of a run, so that its numbers can be reproduced."""

import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from slzo.utils.slurm import job_id

_PACKAGES = ("lightning", "transformers", "datasets", "torchmetrics", "jsonargparse", "peft", "tokenizers", "numpy")
_VARIABLES = ("OMP_NUM_THREADS", "MKL_NUM_THREADS", "MKL_CBWR", "CUBLAS_WORKSPACE_CONFIG", "CUDA_VISIBLE_DEVICES")


def command_line() -> str | None:
    """Return the slzo command that started this process; ``None`` in other Python programs."""
    program = Path(sys.argv[0]) if sys.argv else Path()
    is_ours = program.stem == "slzo" or program.parts[-2:] == ("slzo", "__main__.py")
    return shlex.join(["slzo", *sys.argv[1:]]) if is_ours else None


def program_line() -> str:
    """Return the program and the arguments of this process."""
    return shlex.join(sys.argv)


def environment() -> dict[str, Any]:
    """Return versions, command, processor, threads and kernel settings, as primitives."""
    return {
        "command": program_line(),
        "versions": versions(),
        "commit": git_commit(Path(__file__).parent),
        "slurm_job": job_id(),
        "system": platform.platform(),
        "processor": _processor(),
        "devices": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "threads": torch.get_num_threads(),
        "kernels": {
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.is_available(),
            "mkl": torch.backends.mkl.is_available(),
            "cuda": torch.version.cuda,
            "deterministic": torch.are_deterministic_algorithms_enabled(),
            "float32_matmul": torch.get_float32_matmul_precision(),
        },
        "variables": {name: os.environ[name] for name in _VARIABLES if name in os.environ},
    }


def versions() -> dict[str, str | None]:
    """Return the versions of Python, slzo and the packages that results depend on, if they are installed."""
    return {
        "python": platform.python_version(),
        "slzo": _version("slzo"),
        **{package: version for package in _PACKAGES if (version := _version(package)) is not None},
        "torch": str(torch.__version__),
    }


def device_name(device: torch.device) -> str:
    """Return the type of a device, or the model of a GPU; random directions differ between devices."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def numerics(device: torch.device, processes: int) -> dict[str, str | int | None]:
    """Return what the rounding of a run depends on besides its options and rows, as primitives."""
    return {
        "device": device_name(device),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "processes": processes,
        "slzo": _version("slzo"),
        "torch": str(torch.__version__),
        "transformers": _version("transformers"),
    }


def git_commit(folder: Path) -> str | None:
    """Return the commit of a folder's files, with ``+`` if they were changed; ``None`` if they are in no repository."""
    try:
        if not _git(folder, "ls-files", "."):  # installed somewhere below another project
            return None
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+" if _git(folder, "status", "--porcelain", "--untracked-files=no", ".") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(folder), *args], capture_output=True, text=True, check=True, timeout=10)
    return done.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _processor() -> str:
    """Return the processor's name, on Linux from /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    named = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return named[0] if named else platform.processor() or platform.machine()
