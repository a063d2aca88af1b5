"""States below the tuned layer that one process computes and sends to the others."""

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from slzo.batches.packing import Block, PackedBatch
from slzo.zo.forward import SuffixForward


class SharedPrefix:
    """Divides the computation of the training rows' prefix states over processes.

    Rows go to other processes in each epoch, so every process needs the states of all rows. Each block of rows is computed by one
    process, when a row of it is in a batch for the first time, and is sent to all. Blocks that do not fit into the prefix cache
    of every process are not sent.

    Args:
        forward: Computes the states, and has the cache that stores them.
        blocks: Blocks of training rows, by the process that computes them; the same on all processes.
        rank: Which of these processes this one is.
    """

    def __init__(self, forward: SuffixForward, blocks: Sequence[Sequence[Block]], rank: int) -> None:
        self._forward, self._rank, self._processes = forward, rank, len(blocks)
        self._blocks = list(chain.from_iterable(blocks))
        self._owners = [owner for owner, own in enumerate(blocks) for _ in own]
        self._number = {key: number for number, block in enumerate(self._blocks) for key in block.keys}
        self._missing: set[int] | None = None

    @torch.no_grad()
    def fill(self, batch: PackedBatch, sum_rows: Callable[[Tensor], Tensor], max_tokens: int | None = None) -> None:
        """Store the states of all rows that are in the batch of any process. All processes must call this together.

        Args:
            batch: The batch of this process.
            sum_rows: Returns the sum of a tensor over the processes.
            max_tokens: Most tokens to compute at once; ``None`` for no limit.
        """
        if self._missing is None:
            self._missing = self._find_missing(sum_rows)
        if not self._missing:
            return
        numbers = {self._number[key] for key in batch.example_index if key in self._number}
        needed = sum_rows(self._mask(numbers & self._missing)).nonzero()[:, 0].tolist()
        by_owner: list[list[int]] = [[] for _ in range(self._processes)]
        for number in needed:
            by_owner[self._owners[number]].append(number)
        for group in zip_longest(*by_owner):  # one block of each process at once
            self._exchange([number for number in group if number is not None], sum_rows, max_tokens)
        self._missing -= set(needed)

    def _find_missing(self, sum_rows: Callable[[Tensor], Tensor]) -> set[int]:
        """Return the blocks that every process wants to store and that some process has not stored yet."""
        cache = self._forward.cache
        wanted = {number for number, block in enumerate(self._blocks) if all(map(cache.wants, block.keys))}
        stored = {number for number in wanted if all(key in cache for key in self._blocks[number].keys)}
        wanting, storing = sum_rows(torch.stack([self._mask(wanted), self._mask(stored)]))
        return set(((wanting == self._processes) & (storing < self._processes)).nonzero()[:, 0].tolist())

    def _exchange(self, numbers: Sequence[int], sum_rows: Callable[[Tensor], Tensor], max_tokens: int | None) -> None:
        """Send the states of some blocks, of which this process computes its own, to all processes, and store them."""
        parts, cache = self._forward.parts, self._forward.cache
        model, columns = parts.model, parts.num_columns(self._forward.span.start)
        blocks = [self._blocks[number] for number in numbers]
        sizes = [block.num_tokens for block in blocks]
        states = torch.zeros(sum(sizes), columns, dtype=model.dtype, device=model.device)
        for number, block, own in zip(numbers, blocks, states.split(sizes), strict=True):
            if self._owners[number] == self._rank:
                computed = self._forward.prefix(block.pack().to(model.device), keep=False, max_tokens=max_tokens)
                assert computed is not None  # there are layers below
                own.copy_(computed)
        for block, received in zip(blocks, sum_rows(states).split(sizes), strict=True):  # exact: all other terms are 0
            cache.put(block.keys, block.example_tokens, received)

    def _mask(self, numbers: set[int]) -> Tensor:
        """Return 1 for the given blocks and 0 for the others."""
        mask = torch.zeros(len(self._blocks), device=self._forward.parts.model.device)
        mask[list(numbers)] = 1
        return mask
