"""Batches for Lightning's loops."""

from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

from slzo.data.batch import Row
from slzo.data.sampler import StepBatchSampler

Batch = TypeVar("Batch")


class BatchLoader(Generic[Batch]):
    """Packs batches of rows one by one, in the order of a sampler or plan.

    It is not a torch DataLoader: packing takes microseconds, and Lightning would replace the samplers of a DataLoader, although
    the batches are already divided over processes.

    Args:
        rows: Rows of each batch. Each pass iterates over them again.
        pack: Makes a batch of its rows.
    """

    def __init__(self, rows: StepBatchSampler[Row] | list[list[Row]], pack: Callable[[list[Row]], Batch]) -> None:
        self._rows, self._pack = rows, pack

    def __len__(self) -> int:
        """Number of batches of a pass."""
        return len(self._rows)

    def __iter__(self) -> Iterator[Batch]:
        """Yield the packed batches."""
        return map(self._pack, self._rows)

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: a pass depends on the step alone. Without this method Lightning warns that resuming is not exact."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load nothing."""
