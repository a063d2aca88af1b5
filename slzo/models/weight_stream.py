"""Frozen layers whose weights stay in their files: read when they are needed, one layer ahead, and given up after use.

Safetensors in the type of the model are mapped, not copied. Without this the system reads a page when it is first touched, and
keeps what was used last: in a sweep over layers that do not all fit, that is what is needed last.
"""

import ctypes
import mmap
import os
import sys
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import nn

from slzo.errors import SlzoError

_POPULATE_READ, _WILLNEED, _DONTNEED = 22, 3, 4  # from linux/mman.h


@dataclass(frozen=True)
class Range:
    """Whole pages of a mapped file.

    Attributes:
        address: Of the first.
        length: Bytes.
        path: The file.
        offset: Where they are in it.
    """

    address: int
    length: int
    path: str
    offset: int


class WeightStream:
    """Fetches each frozen layer before it runs and gives it up after, through forward hooks.

    Args:
        layers: All decoder layers.
        start: First layer that is run at each step, which is tuned.
        stop: One past the last tuned layer; the tuned ones are never given up.
        budget: Bytes of frozen layers to keep; the first ones above the tuned ones are, as many as fit.

    Raises:
        SlzoError: The weights are not mapped from files, so that nothing can be given up.
    """

    def __init__(self, layers: nn.ModuleList, start: int, stop: int, budget: int) -> None:
        mapped = _mapped_files()
        self._ranges = {
            number: _ranges(layer, mapped) for number, layer in enumerate(layers) if not start <= number < stop
        }
        if not any(self._ranges.values()):
            raise SlzoError(
                "model.engine.weights_gb: the frozen weights are not mapped from safetensors files, so they stay in memory; set "
                "model.dtype to the type in the files, without model.quantization, on a CPU under Linux, or leave the option out"
            )
        self.num_bytes = {number: sum(each.length for each in own) for number, own in self._ranges.items()}
        self._kept = _first_that_fit(self.num_bytes, stop, budget)
        self._order = sorted(self._ranges)
        self._fetcher = ThreadPoolExecutor(1, thread_name_prefix="slzo-weights")
        self._fetched: dict[int, Future[None]] = {}
        self._hooks = []
        for number, layer in enumerate(layers):
            self._hooks.append(layer.register_forward_pre_hook(partial(self._before, number)))
            self._hooks.append(layer.register_forward_hook(partial(self._after, number)))

    def close(self) -> None:
        """Leave the weights to the system again."""
        for hook in self._hooks:
            hook.remove()
        self._fetcher.shutdown()

    def _before(self, number: int, *_: Any) -> None:
        waited = self._fetched.pop(number, None)
        if waited is not None:
            waited.result()
        following = number + 1
        if following in self._ranges and following not in self._fetched:
            self._fetched[following] = self._fetcher.submit(_fetch, self._ranges[following])

    def _after(self, number: int, *_: Any) -> None:
        if number in self._ranges and number not in self._kept:
            _give_up(self._ranges[number])


def _first_that_fit(sizes: dict[int, int], stop: int, budget: int) -> Collection[int]:
    kept = set()
    for number in sorted(number for number in sizes if number >= stop):
        if sizes[number] > budget:
            break
        budget -= sizes[number]
        kept.add(number)
    return kept


def _mapped_files() -> list[tuple[int, int, int, str]]:
    """Start, end, offset and path of each file mapping of this process; none where that cannot be known."""
    table = Path("/proc/self/maps")
    if sys.platform != "linux" or not table.is_file():
        return []
    found = []
    for line in table.read_text(encoding="utf-8").splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].endswith(".safetensors"):
            first, last = (int(end, 16) for end in fields[0].split("-"))
            found.append((first, last, int(fields[2], 16), fields[5]))
    return found


def _ranges(layer: nn.Module, mapped: Sequence[tuple[int, int, int, str]]) -> list[Range]:
    """The whole pages of a layer's weights; a page that also holds a part of another tensor is left alone."""
    found = []
    for tensor in layer.parameters():
        begin, size = tensor.data_ptr(), tensor.numel() * tensor.element_size()
        for first, last, offset, path in mapped:
            if first <= begin and begin + size <= last:
                start = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
                length = (begin + size) // mmap.PAGESIZE * mmap.PAGESIZE - start
                if length > 0:
                    found.append(Range(start, length, path, offset + start - first))
    return found


def _madvise() -> Callable[[int, int, int], int]:
    function = ctypes.CDLL(None, use_errno=True).madvise
    function.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return function


def _fetch(ranges: Sequence[Range]) -> None:
    """Read pages in; calls of the C library leave the interpreter free meanwhile."""
    advise = _madvise()
    for each in ranges:
        if advise(each.address, each.length, _POPULATE_READ):  # Linux before 5.14 has only the other
            advise(each.address, each.length, _WILLNEED)


def _give_up(ranges: Sequence[Range]) -> None:
    """Give pages back, and let the system forget what it read; they were never written to."""
    advise = _madvise()
    for each in ranges:
        advise(each.address, each.length, _DONTNEED)
        file = os.open(each.path, os.O_RDONLY)
        try:
            os.posix_fadvise(file, each.offset, each.length, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(file)
