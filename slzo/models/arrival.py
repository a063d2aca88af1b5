"""Tensors on their way to a card, copied on a stream of their own while it computes."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Arrival:
    """A tensor that may still be on its way.

    Attributes:
        tensor: For use after :meth:`wait` only.
        copied: When it is there, on another stream; ``None`` if the present stream makes it.
    """

    tensor: Tensor
    copied: torch.cuda.Event | None = None

    def wait(self) -> Tensor:
        """The tensor: what the present stream does from here on comes after the copy. The processor does not wait."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(self.tensor.device)
            stream.wait_event(self.copied)
            self.tensor.record_stream(stream)  # its memory belongs to the other stream, which would reuse it
        return self.tensor


class CopyStream:
    """Makes tensors from pinned memory; on a card beside what it computes, elsewhere at once."""

    def __init__(self) -> None:
        self._streams: dict[torch.device, torch.cuda.Stream] = {}

    def arrival(self, make: Callable[[], Tensor], device: torch.device) -> Arrival:
        """What ``make`` makes on a device from pinned memory alone: the present stream's work is not waited for."""
        if device.type != "cuda":
            return Arrival(make())
        if device not in self._streams:
            self._streams[device] = torch.cuda.Stream(device)
        stream = self._streams[device]
        with torch.cuda.stream(stream):
            return Arrival(make(), stream.record_event())
