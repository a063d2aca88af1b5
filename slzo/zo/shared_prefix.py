"""States below the tuned layer that one process computes and sends to the others."""

from collections.abc import Callable, Sequence
from itertools import chain, zip_longest

import torch
from torch import Tensor

from slzo.batches.packing import Block, PackedBatch
from slzo.zo.forward import SuffixForward
from slzo.zo.processes import gather_tensors


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
    def fill(self, batch: PackedBatch, gather: Callable[[Tensor], Tensor], max_tokens: int | None = None) -> None:
        """Store the states of all rows that are in the batch of any process. All processes must call this together.

        Args:
            batch: The batch of this process.
            gather: Returns the tensors of the processes, stacked.
            max_tokens: Most tokens to compute at once; ``None`` for no limit.
        """
        if self._missing is None:
            self._missing = self._find_missing(gather)
        if not self._missing:
            return
        numbers = {self._number[key] for key in batch.example_index if key in self._number}
        needed = gather(self._mask(numbers & self._missing)).any(dim=0).nonzero()[:, 0].tolist()
        by_owner: list[list[int]] = [[] for _ in range(self._processes)]
        for number in needed:
            by_owner[self._owners[number]].append(number)
        for group in zip_longest(*by_owner):  # one block of each process at once
            self._exchange([None if number is None else self._blocks[number] for number in group], gather, max_tokens)
        self._missing -= set(needed)

    def _find_missing(self, gather: Callable[[Tensor], Tensor]) -> set[int]:
        """Return the blocks that every process wants to store and that some process has not stored yet."""
        cache = self._forward.cache
        wanted = {number for number, block in enumerate(self._blocks) if all(map(cache.wants, block.keys))}
        stored = {number for number in wanted if all(key in cache for key in self._blocks[number].keys)}
        wanted_by_all, stored_by_all = gather(torch.stack([self._mask(wanted), self._mask(stored)])).all(dim=0)
        return set((wanted_by_all & ~stored_by_all).nonzero()[:, 0].tolist())

    def _exchange(
        self, blocks: Sequence[Block | None], gather: Callable[[Tensor], Tensor], max_tokens: int | None
    ) -> None:
        """Compute the states of a block, send them to all processes, and store those of all.

        Args:
            blocks: The block of each process; ``None`` if it has none to compute.
            gather: Returns the tensors of the processes, stacked.
            max_tokens: Most tokens to compute at once; ``None`` for no limit.
        """
        parts = self._forward.parts
        model, own = parts.model, blocks[self._rank]
        if own is None:
            states = torch.empty(0, parts.num_columns(self._forward.span.start), dtype=model.dtype, device=model.device)
        else:
            computed = self._forward.prefix(own.pack().to(model.device), keep=False, max_tokens=max_tokens)
            assert computed is not None  # there are layers below
            states = computed
        lengths = [[0 if block is None else block.num_tokens] for block in blocks]
        (received,) = gather_tensors(gather, [states], lengths)
        for block, of_block in zip(blocks, received, strict=True):
            if block is not None:
                self._forward.cache.put(block.keys, block.example_tokens, of_block)

    def _mask(self, numbers: set[int]) -> Tensor:
        """Return whether each block is among the given ones, dtype bool."""
        mask = torch.zeros(len(self._blocks), dtype=torch.bool, device=self._forward.parts.model.device)
        mask[list(numbers)] = True
        return mask
