"""Processes that hold shares of the same layers (FSDP2, ``fully_shard``), and how they agree which layer they gather.

They do not run a layer equally often: each has its own cached rows, and answers of other lengths. So each names the layer that it
runs next, all gather the lowest of these, and a process that does not need it drops it at once. A process that has nothing to run
joins in until all are done.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from weakref import WeakValueDictionary

import torch
from torch import Tensor, distributed, nn
from torch.distributed import DistError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

_DONE = torch.iinfo(torch.int64).max
MOST_IDLE = 2
"""Layers that stay whole after their use, until others are gathered.

Often only one or two layers are above the tuned one, and they are all that runs in a step, several times.
"""


class ShardGroup:
    """The processes that share layers, as seen from one of them. Making one is a collective call.

    Args:
        device: Device of this process.
        timeout: Time after which a process that waits for the others fails; ``None`` for PyTorch's default.

    Attributes:
        world_size: Number of processes.
        num_bytes: Bytes of layers that this process has received so far.
        seconds: Time that it has spent on that, with waiting for the others. On an accelerator, transfers that run in the
            background are not included.
    """

    def __init__(self, device: torch.device, timeout: timedelta | None = None) -> None:
        self.world_size = distributed.get_world_size()
        self.num_bytes = 0
        self.seconds = 0.0
        self._mesh = init_device_mesh(device.type, (self.world_size,))
        self._agreement = distributed.new_group(backend="gloo", timeout=timeout)
        self._shards: WeakValueDictionary[int, LayerShard] = WeakValueDictionary()
        self._used: set[int] = set()
        self._idle: list[int] = []  # whole and not in use, the last used one at the end
        self._next_key = 0

    def divide(self, tensors: list[Tensor]) -> LayerShard:
        """Keep this process's share of some tensors, which have the same values on all processes. A collective call."""
        weights = nn.ParameterList(nn.Parameter(tensor, requires_grad=False) for tensor in tensors)
        received = sum(tensor.nbytes for tensor in tensors) * (self.world_size - 1) // self.world_size
        shard = LayerShard(self, self._next_key, fully_shard(weights, mesh=self._mesh), received)
        self._shards[self._next_key] = shard
        self._next_key += 1
        return shard

    def gather(self, key: int) -> None:
        """Gather the shard of this key together with all processes; until they agree on it, join in gathering others.

        A shard that is still whole is not gathered again. ``_DONE`` stands for no shard: this process only joins in, until all
        are done.

        Raises:
            DistError: Another process has ended or does not answer.
        """
        if key in self._idle:
            self._idle.remove(key)
            self._used.add(key)
            return
        started = time.perf_counter()
        while (agreed := self._agree(key)) != _DONE:
            shard = self._shards[agreed]
            self._reshard_idle(MOST_IDLE - 1, also=agreed)
            # memory that was first used in inference mode could not be used outside of it
            with _lost_processes(), torch.inference_mode(False):
                shard.weights.unshard()
            self.num_bytes += shard.num_bytes
            if agreed == key:
                self._used.add(key)
                break
            shard.weights.reshard()
        self.seconds += time.perf_counter() - started

    def release(self, key: int) -> None:
        """Say that a gathered shard is not used any more. It may stay whole until others are gathered."""
        if key in self._used:  # otherwise gathering it has failed
            self._used.remove(key)
            self._idle.append(key)
            self._reshard_idle(MOST_IDLE)

    def _reshard_idle(self, most: int, also: int | None = None) -> None:
        """Free idle shards until at most ``most`` are whole, the one used longest ago first, and the one of the key ``also``."""
        while len(self._idle) > most or also in self._idle:
            key = also if also in self._idle else self._idle[0]
            self._idle.remove(key)
            if (shard := self._shards.get(key)) is not None:
                shard.weights.reshard()

    def barrier(self) -> None:
        """Return when all processes are here; until then, join in gathering what the others need. A collective call.

        Raises:
            DistError: Another process has ended or does not answer.
        """
        self.gather(_DONE)

    def _agree(self, key: int) -> int:
        wanted = torch.tensor(key)
        with _lost_processes():
            distributed.all_reduce(wanted, distributed.ReduceOp.MIN, group=self._agreement)
        return int(wanted)


@contextmanager
def _lost_processes() -> Iterator[None]:
    """Turn the errors of a failed exchange into DistError, to tell them from other errors of a forward pass."""
    try:
        yield
    except (DistError, torch.OutOfMemoryError):
        raise
    except RuntimeError as error:
        raise DistError(str(error)) from error


class LayerShard:
    """This process's share of the weights of a layer.

    Args:
        group: The processes that have the other shares.
        key: The number of the layer in the group, the same on all processes.
        weights: The divided tensors.
        num_bytes: Bytes that this process receives when the layer is gathered.
    """

    def __init__(self, group: ShardGroup, key: int, weights: FSDPModule, num_bytes: int) -> None:
        self.weights = weights
        self.num_bytes = num_bytes
        self._group = group
        self._key = key

    @property
    def tensors(self) -> list[nn.Parameter]:
        """The tensors: whole while they are gathered, otherwise shares, as DTensors."""
        assert isinstance(self.weights, nn.Module)
        return list(self.weights.parameters())

    def gather(self) -> list[nn.Parameter]:
        """Return the whole tensors, until :meth:`drop`; see :meth:`ShardGroup.gather`."""
        self._group.gather(self._key)
        return self.tensors

    def drop(self) -> None:
        """Say that the whole tensors are not used any more; see :meth:`ShardGroup.release`."""
        self._group.release(self._key)
