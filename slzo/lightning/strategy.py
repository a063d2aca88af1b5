"""The Lightning strategy that divides the frozen layers over processes."""

from datetime import timedelta
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.constants import default_pg_timeout

from slzo.models.shard_group import ShardGroup

SHARDED = "sharded"


class ShardedStrategy(DDPStrategy):
    """``ddp`` whose processes divide the weights of the frozen layers; by name, ``trainer.strategy sharded``.

    Each process holds a share of every layer, see :mod:`slzo.models.sharded`. Embeddings, head and tuned layers are whole on
    every process. Steps, rows and checkpoints are those of ``ddp``.

    Args:
        timeout: Time after which a process that waits for the others fails.
        arguments: Further arguments of :class:`lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        shard_group: The processes that share the layers; ``None`` in a run of one process.
    """

    shard_group: ShardGroup | None = None

    def __init__(self, timeout: timedelta | None = default_pg_timeout, **arguments: Any) -> None:
        super().__init__(timeout=timeout, **arguments)
        self._shard_timeout = timeout

    def setup_environment(self) -> None:
        super().setup_environment()
        if self.shard_group is None and self.world_size > 1:
            self.shard_group = ShardGroup(self.root_device, self._shard_timeout)

    def setup(self, trainer: Trainer) -> None:
        self._layer_barrier()
        super().setup(trainer)

    # A process that waits must keep answering gathers of layers, or the others deadlock.

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        self._layer_barrier()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        self._layer_barrier()
        return super().broadcast(obj, src)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        self._layer_barrier()
        return super().reduce(*args, **kwargs)

    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        self._layer_barrier()
        return super().all_gather(*args, **kwargs)

    def on_predict_end(self) -> None:
        self._layer_barrier()
        super().on_predict_end()

    def _layer_barrier(self) -> None:
        if self.shard_group is not None:
            self.shard_group.barrier()


def shard_group_of(trainer: Trainer) -> ShardGroup | None:
    """Return the processes that share the frozen layers in a trainer's run; ``None`` if each has all."""
    return trainer.strategy.shard_group if isinstance(trainer.strategy, ShardedStrategy) else None
