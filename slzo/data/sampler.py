"""Sampler whose rows depend only on (seed, step): the same after a resume, and on more processes with the same total batch."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Generic, TypeVar

import torch

from slzo.utils.seeding import derive_seed

T = TypeVar("T")


@dataclass(eq=False)
class StepBatchSampler(Generic[T]):
    """Random batches without replacement.

    Each epoch is a new permutation of all rows, drawn from (seed, epoch). Consecutive rows form the batches. With n processes,
    a batch is n times as large, and each process takes a part of it. The parts have about equally many tokens,
    since the processes wait for the slowest one.

    A pass has as many batches as an epoch and starts at the current step of the run, even in the middle of an epoch. A resumed
    run therefore continues with the right rows, and there is no state to save.

    Args:
        rows: The rows of the data set.
        num_tokens: Number of tokens of each row.
        batch_size: Number of rows per batch and process.
        seed: Seed of the permutations.
        rank: Rank of this process.
        world_size: Number of processes.
        steps_done: Returns the number of completed steps; called at the start of each pass.
    """

    rows: Sequence[T] = field(repr=False)
    num_tokens: Sequence[int] = field(repr=False)
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1
    steps_done: Callable[[], int] = lambda: 0
    _batches: tuple[int, list[list[T]]] = field(default=(-1, []), init=False, repr=False)

    def __len__(self) -> int:
        """Number of batches per epoch; a smaller last batch needs at least one row per process."""
        full, rest = divmod(len(self.rows), self.batch_size * self.world_size)
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[T]]:
        """Yield as many batches as an epoch has, starting at the current step."""
        first = self.steps_done()
        return (self.rows_of_step(step) for step in range(first, first + len(self)))

    def rows_of_step(self, step: int) -> list[T]:
        """Return the rows of this process in a step; steps count from 0."""
        epoch, number = divmod(step, len(self))
        if self._batches[0] != epoch:
            self._batches = epoch, self._make_batches(epoch)
        return self._batches[1][number]

    def _make_batches(self, epoch: int) -> list[list[T]]:
        generator = torch.Generator().manual_seed(derive_seed("epoch", self.seed, epoch))
        order = torch.randperm(len(self.rows), generator=generator)
        batches = order.split(self.batch_size * self.world_size)[: len(self)]
        own = (divide_by_tokens(batch.tolist(), self.num_tokens, self.world_size)[self.rank] for batch in batches)
        return [[self.rows[number] for number in numbers] for numbers in own]


def divide_by_tokens(rows: Sequence[int], num_tokens: Sequence[int], parts: int) -> list[list[int]]:
    """Divide rows into parts of about equally many tokens: each, longest first, goes to the part with the fewest tokens.

    There are at least as many rows as parts; ``num_tokens`` has the number of tokens of each row of the data set. The rows of a
    part keep their order. No part has more than ``len(rows) / parts`` rows, rounded up.
    """
    most = ceil(len(rows) / parts)
    divided: list[list[int]] = [[] for _ in range(parts)]
    sums = [0] * parts
    for place in sorted(range(len(rows)), key=lambda place: -num_tokens[rows[place]]):
        part = min((part for part in range(parts) if len(divided[part]) < most), key=sums.__getitem__)
        divided[part].append(place)
        sums[part] += num_tokens[rows[place]]
    return [[rows[place] for place in sorted(places)] for places in divided]
