"""The rows of each training step as a function of (seed, step): the same after a resume and on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.data import BatchSampler

from slzo.data.balance import balanced_order
from slzo.utils.seeding import derive_seed

_WINDOW_BATCHES = 16


@dataclass(eq=False)
class StepBatchSampler(BatchSampler):
    """Random batches without replacement.

    Every epoch of the rows is a new permutation of all of them, drawn from (seed, epoch). Consecutive rows form the batches;
    with several processes each takes every n-th row of a batch that is n times as large.

    A pass has as many batches as an epoch and begins at the step that the run is at, wherever in an epoch that is. A resumed
    run, or a new loader in the middle of a run, therefore goes on with the right rows, and nothing about the loader has to be
    saved.

    Args:
        num_rows: Rows of the data set.
        batch_size: Rows per batch and process.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        lengths: Length of each row; batches are then made of rows of similar length, by sorting within windows of some
            batches and shuffling the batches. Each row still comes once per epoch, so an epoch is unbiased, but the rows of
            one batch are not independent draws.
        classes: Class of each row; an epoch then draws all classes equally often, see :mod:`slzo.data.balance`. Not with
            lengths.
        steps_done: Number of steps that the run has taken, asked at the start of each pass.
    """

    num_rows: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    lengths: Sequence[int] | None = None
    classes: Sequence[int] | None = None
    steps_done: Callable[[], int] = lambda: 0
    _batches: tuple[int, list[list[int]]] = field(default=(-1, []), init=False, repr=False)

    def __len__(self) -> int:
        """Batches per epoch; a last, smaller batch needs a row for every process."""
        full, rest = divmod(self.num_rows, self.batch_size * self.world_size)
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        """As many batches as an epoch has, from the present step on."""
        first = self.steps_done()
        return (self.rows_of_step(step) for step in range(first, first + len(self)))

    def rows_of_step(self, step: int) -> list[int]:
        """Numbers of the rows of this process in a step, counted from 0."""
        epoch, place = divmod(step, len(self))
        if self._batches[0] != epoch:
            self._batches = epoch, self._of_epoch(epoch)
        return self._batches[1][place]

    def _of_epoch(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed("epoch", self.seed, epoch))
        if self.classes is None:
            order = torch.randperm(self.num_rows, generator=generator).tolist()
        else:
            order = balanced_order(self.classes, self.seed, epoch)
        size = self.batch_size * self.world_size
        places = list(range(len(self)))
        lengths, window = self.lengths, size * _WINDOW_BATCHES
        if lengths is not None:
            windows = (order[start : start + window] for start in range(0, len(order), window))
            order = [row for part in windows for row in sorted(part, key=lambda row: lengths[row])]
            places = torch.randperm(len(self), generator=generator).tolist()
        return [order[place * size : (place + 1) * size][self.rank :: self.world_size] for place in places]
