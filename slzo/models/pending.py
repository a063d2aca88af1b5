"""Asynchronous copies from pinned memory to a GPU, on a separate CUDA stream."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class PendingTensor:
    """A tensor that may still be being copied.

    Attributes:
        tensor: The tensor; use it only after :meth:`wait`.
        copied: Event on the other stream that marks the end of the copy; ``None`` if the current stream makes the tensor.
    """

    tensor: Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """Return the tensor and make the current stream wait for the copy. The CPU does not wait."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.copied)
            self.tensor.record_stream(stream)  # the other stream owns the memory and would reuse it
        return self.tensor


class CopyStream:
    """Copies tensors from pinned memory: on a GPU while it computes, on other devices at once."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def copy(self, make: Callable[[], Tensor], device: torch.device) -> PendingTensor:
        """Run ``make``, which must read pinned memory only, without waiting for the work of the current stream."""
        if device.type != "cuda":
            return PendingTensor(make())
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            return PendingTensor(make(), stream.record_event())
