"""Batches of an epoch as a function of (seed, epoch): the same after a resume and on any number of processes."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import BatchSampler

from slzo.seeding import derive_seed


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
        first_batch: Batches of the first epoch that a resumed run has already seen.
    """

    def __init__(
        self, num_rows: int, batch_size: int, seed: int, rank: int = 0, world_size: int = 1, first_batch: int = 0
    ) -> None:
        self.num_rows = num_rows
        self.batch_size = batch_size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.first_batch = first_batch
        self.epoch = 0
        self.sampler: Any = self  # Lightning calls set_epoch on this attribute

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation."""
        self.epoch = epoch

    def __len__(self) -> int:
        full, rest = divmod(self.num_rows, self.batch_size * self.world_size)
        # a last, smaller batch needs a row for every process
        return full + (rest >= self.world_size)

    def __iter__(self) -> Iterator[list[int]]:
        generator = torch.Generator().manual_seed(derive_seed("epoch", self.seed, self.epoch))
        order = torch.randperm(self.num_rows, generator=generator).tolist()
        size = self.batch_size * self.world_size
        first, self.first_batch = self.first_batch, 0
        for batch in range(first, len(self)):
            yield order[batch * size : (batch + 1) * size][self.rank :: self.world_size]
