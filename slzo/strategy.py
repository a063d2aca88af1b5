"""The Lightning strategy that divides the frozen layers over processes."""

from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.strategies import DDPStrategy

from slzo.models.sharded import ShardGroup

SHARDED = "sharded"


class ShardedStrategy(DDPStrategy):
    """``ddp`` whose processes divide the weights of the frozen layers; by name, ``trainer.strategy sharded``.

    Each process holds a share of every layer, see :mod:`slzo.models.sharded`. Embeddings, head and tuned layers are whole on
    every process. Steps, rows and checkpoints are those of ``ddp``. Takes the arguments of
    :class:`lightning.pytorch.strategies.DDPStrategy`.

    Attributes:
        shards: The processes that share the layers; ``None`` in a run of one process.
    """

    shards: ShardGroup | None = None

    def setup_environment(self) -> None:
        """Connect the processes."""
        super().setup_environment()
        if self.shards is None and self.world_size > 1:
            self.shards = ShardGroup(self.root_device)

    def setup(self, trainer: Trainer) -> None:
        """Prepare the run."""
        self._meet()
        super().setup(trainer)

    # Before any exchange a process joins in gathering layers until the others are here too.

    def barrier(self, *args: Any, **kwargs: Any) -> None:
        """Wait for the other processes."""
        self._meet()
        super().barrier(*args, **kwargs)

    def broadcast(self, obj: Any, src: int = 0) -> Any:
        """Return the object of one process."""
        self._meet()
        return super().broadcast(obj, src)

    def reduce(self, *args: Any, **kwargs: Any) -> Any:
        """Return the sum, mean or maximum of a tensor over the processes."""
        self._meet()
        return super().reduce(*args, **kwargs)

    def all_gather(self, *args: Any, **kwargs: Any) -> Any:
        """Return a tensor of each process."""
        self._meet()
        return super().all_gather(*args, **kwargs)

    def _meet(self) -> None:
        if self.shards is not None:
            self.shards.meet()


def shards_of(trainer: Trainer) -> ShardGroup | None:
    """Return the processes that share the frozen layers in a trainer's run; ``None`` if each has all."""
    return trainer.strategy.shards if isinstance(trainer.strategy, ShardedStrategy) else None


def num_shards(trainer: Trainer) -> int:
    """Return how many processes divide the frozen layers, before a run too."""
    return trainer.world_size if isinstance(trainer.strategy, ShardedStrategy) else 1
