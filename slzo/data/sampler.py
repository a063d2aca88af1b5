"""Batches of an epoch as a function of (seed, epoch): the same after a resume and on any number of processes."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch.utils.data import BatchSampler

from slzo.data.balance import balanced_order
from slzo.seeding import derive_seed

_WINDOW_BATCHES = 16


@dataclass(eq=False)
class EpochBatchSampler(BatchSampler):
    """Random batches without replacement.

    Every epoch is a new permutation of all rows, drawn from (seed, epoch). Consecutive rows form the batches; with several
    processes each takes every n-th row of a batch that is n times as large.

    Args:
        num_rows: Rows of the data set.
        batch_size: Rows per batch and process.
        seed: Seed of the permutations.
        rank: This process.
        world_size: Number of processes.
        lengths: Of each row; batches are then made of rows of similar length, by sorting within windows of
            some batches and shuffling the batches. Each row still comes once per epoch, so an epoch is unbiased, but the rows
            of one batch are no independent draw.
        classes: Of each row; an epoch then draws all of them alike, see :mod:`slzo.data.balance`. Not with lengths.
        batches_done: How many batches the run has seen so far, asked at the start of each pass; 0 if left out. A resumed run,
            or a new loader in the middle of a run, goes on from there.
    """

    num_rows: int
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    lengths: Sequence[int] | None = None
    batches_done: Callable[[], int] = lambda: 0
    classes: Sequence[int] | None = None

    def __len__(self) -> int:
        full, rest = divmod(self.num_rows, self.batch_size * self.world_size)
        # a last, smaller batch needs a row for every process
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        epoch, first = divmod(self.batches_done(), len(self))
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
        for place in places[first:]:
            yield order[place * size : (place + 1) * size][self.rank :: self.world_size]
