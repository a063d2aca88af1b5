"""Measure the seconds of a call, or run it in a new process to measure its peak memory."""

import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import ParamSpec, TypeVar

import torch
from transformers.utils import logging

from slzo.utils.errors import SlzoError
from slzo.utils.runtime import bound_kernel_caches, keep_freed_memory

_Inputs = ParamSpec("_Inputs")
_Result = TypeVar("_Result")
Clock = Callable[[], float]  # seconds


def clock_of(cpu_time: bool) -> Clock:
    """Return the clock of this process: processor time, for a machine that does other work too, or time."""
    return time.process_time if cpu_time else time.perf_counter


def timed(function: Callable[[], _Result], clock: Clock = time.perf_counter) -> tuple[float, _Result]:
    """Return the seconds that a call takes, and its result."""
    started = clock()
    result = function()
    return clock() - started, result


def median_seconds(function: Callable[[], object], clock: Clock, calls: int) -> float:
    """Return the median seconds of some calls."""
    return statistics.median(timed(function, clock)[0] for _ in range(calls))


def prepare_process(threads: int) -> None:
    """Set the threads of torch, and memory and kernel caches as the slzo command does; no progress bars are shown."""
    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    keep_freed_memory()
    bound_kernel_caches()


def in_new_process(function: Callable[_Inputs, _Result], *args: _Inputs.args, **kwargs: _Inputs.kwargs) -> _Result:
    """Call a function in a new process, and return its result.

    Raises:
        SlzoError: The process was killed.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        try:
            return pool.submit(function, *args, **kwargs).result()
        except BrokenProcessPool as error:
            raise SlzoError("a process of this measurement was killed; check that the memory is sufficient") from error
