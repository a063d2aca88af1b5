"""Hidden states that enter the tuned layer, kept per example: the layers before it never change."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from slzo.batches.packing import Block, PackedBatch, TokenBatch
from slzo.batches.sharing import chunk_by_tokens
from slzo.models.arrival import Arrival, CopyStream
from slzo.utils.errors import SlzoError

_BLOCK_BYTES = 64 * 2**20


class PrefixCache:
    """Keeps hidden states by example until a budget is spent; the rest is recomputed each time.

    Packed hidden states of an example do not depend on the batch but for rounding, so they fit any later batch. With a
    :meth:`plan` they do not depend on it at all.

    Args:
        start: The layer that the states enter.
        budget_gb: Space to use, in GiB; 0 keeps nothing.
        dtype: Type to store, ``None`` for that of the states. A smaller one saves space and rounds.
        directory: Use a memory-mapped file in this folder instead of memory; it has no name and vanishes with the process.
        beside: Another cache that the budget is shared with, and that comes first.

    Raises:
        SlzoError: The folder cannot be written.
    """

    def __init__(
        self,
        start: int,
        budget_gb: float,
        dtype: torch.dtype | None = None,
        directory: str | None = None,
        beside: "PrefixCache | None" = None,
    ) -> None:
        self.start = start
        self.budget = int(budget_gb * 2**30)
        self.dtype = dtype
        self.directory = directory
        if directory is not None:
            check_cache_folder(directory)
        self.beside = beside
        self.num_bytes = 0
        self._planned = 0
        self._full = False
        self._states: dict[int, Tensor] = {}
        self._plan: dict[int, Block] | None = None
        self._block: Tensor | None = None
        self._used = 0
        self._copies = CopyStream()

    def __contains__(self, key: int) -> bool:
        return key in self._states

    def plan(self, blocks: Iterable[Block], token_bytes: int) -> None:
        """Fix what is kept, and with which others each example is computed: whole blocks, in this order, as long as they fit.

        The states then are those of any other run with the same blocks and budget, whatever was asked for before. Kept states of
        examples that are in no block are forgotten.

        Args:
            blocks: Each example is in one of them at most.
            token_bytes: Space that a packed token's states take.
        """
        self._plan, self._planned = {}, 0
        for block in blocks:
            size = block.num_tokens * token_bytes
            if self._planned + size <= self._room:
                self._planned += size
                self._plan |= dict.fromkeys(block.keys, block)
        if not self._states.keys() <= self._plan.keys():
            self.clear()

    def wants(self, key: int) -> bool:
        """Whether an example's states are kept, or would be."""
        return key in self or (not self._full and self._room > 0 if self._plan is None else key in self._plan)

    @property
    def _room(self) -> int:
        """What the cache beside this one leaves of the budget."""
        return self.budget - (0 if self.beside is None else max(self.beside.num_bytes, self.beside._planned))

    def states_of(
        self,
        batch: PackedBatch,
        run: Callable[[TokenBatch], Tensor],
        dtype: torch.dtype,
        keep: bool,
        max_tokens: int | None = None,
    ) -> Arrival:
        """States of a batch, shape (T, hidden), of a type, rounded as they would come back; ``run`` computes those of tokens.

        Only examples that are not held are run; their states are kept with ``keep``. Those that the plan has are run with the
        others of their block. With ``max_tokens`` no more than these are run at once; the examples must not share tokens then.
        """
        keys, device = batch.example_index, batch.input_ids.device
        if keep:
            for block in self.blocks_of(key for key in keys if key not in self):
                if block.keys != keys:  # else the batch is the block, and is run below
                    whole = block.pack().to(device)
                    states = self._run(run, whole, range(whole.num_examples), max_tokens)
                    self.put(whole.example_index, whole.example_tokens, states)
        missing = [number for number, key in enumerate(keys) if key not in self]
        if not missing:
            return self._copies.arrival(lambda: self.gather(keys, {}, device, dtype), device)
        fresh = self._run(run, batch, missing, max_tokens)
        lengths = [batch.example_tokens[number] for number in missing]
        if keep:
            self.put([keys[number] for number in missing], lengths, fresh)
        if len(missing) == batch.num_examples:
            return Arrival(fresh)
        new = dict(zip(missing, fresh.split(lengths), strict=True))
        return Arrival(self.gather(keys, new, device, dtype))

    def _run(
        self,
        run: Callable[[TokenBatch], Tensor],
        batch: PackedBatch,
        numbers: Sequence[int],
        max_tokens: int | None,
    ) -> Tensor:
        """States of some of the batch's examples, shape (T, hidden)."""
        chunks: Sequence[Sequence[int]] = [range(len(numbers))]
        if max_tokens is not None:
            sizes = [range(batch.example_tokens[number]) for number in numbers]
            chunks = chunk_by_tokens(sizes, max_tokens, share=False)
        states = []
        for places in chunks:
            whole = len(places) == batch.num_examples
            states.append(run(batch if whole else batch.select([numbers[place] for place in places])))
        return self.round(states[0] if len(states) == 1 else torch.cat(states))

    def blocks_of(self, keys: Iterable[int]) -> list[Block]:
        """The planned blocks of some examples."""
        plan = self._plan or {}
        return list({id(plan[key]): plan[key] for key in keys if key in plan}.values())

    def round(self, hidden: Tensor) -> Tensor:
        """The states as they come back from the cache, so that a loss does not depend on what is cached."""
        if self.dtype is None or not self.budget:
            return hidden
        return hidden.to(self.dtype).to(hidden.dtype)

    def rounds(self, dtype: torch.dtype) -> bool:
        """Whether states of a type lose something in the cache."""
        return self.dtype is not None and torch.promote_types(self.dtype, dtype) != self.dtype

    def gather(
        self, keys: Sequence[int], new: Mapping[int, Tensor], device: torch.device, dtype: torch.dtype
    ) -> Tensor:
        """Concatenated hidden states of examples, shape (T, hidden); those not cached are in ``new``, by place in ``keys``."""
        pieces = [
            new[place] if place in new else self._states[key].to(device, non_blocking=True).to(dtype)
            for place, key in enumerate(keys)
        ]
        return torch.cat(pieces)

    def put(self, keys: Sequence[int], lengths: Sequence[int], hidden: Tensor) -> None:
        """Keep what fits of the hidden states (T, hidden) of examples, given by key and number of packed tokens."""
        dtype = self.dtype or hidden.dtype
        for key, states in zip(keys, hidden.split(tuple(lengths)), strict=True):
            size = states.numel() * dtype.itemsize
            planned = self._plan is None or key in self._plan
            if not planned or key in self._states:
                continue
            if self.num_bytes + size > self._room:
                self._full = True
                continue
            place = self._allocate(states.numel(), dtype, pinned=states.is_cuda)
            self._states[key] = place.copy_(states.detach().flatten()).view(states.shape)
            self.num_bytes += size

    def take_over(self, other: "PrefixCache") -> None:
        """Keep what fits of another's states, without a copy, if they enter the same layer and are of the same type."""
        if (other.start, other.dtype) != (self.start, self.dtype):
            return
        for key, states in other._states.items():
            size = states.numel() * states.element_size()
            if key not in self and self.wants(key) and self.num_bytes + size <= self._room:
                self._states[key] = states
                self.num_bytes += size

    def empty_for(self, start: int) -> "PrefixCache":
        """A cache of the same settings for states that enter another layer."""
        return PrefixCache(start, self.budget / 2**30, self.dtype, self.directory)

    def clear(self) -> None:
        """Forget everything; needed when the layers before the tuned one change."""
        self._states.clear()
        self._block, self._used, self.num_bytes, self._full = None, 0, 0, False

    def _allocate(self, count: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        """Room for ``count`` values in the present block, or in a new one."""
        if self._block is None or self._used + count > self._block.numel():
            size = max(count, min(_BLOCK_BYTES, self.budget) // dtype.itemsize)
            if self.directory is None:  # pinned: copies to the GPU need no wait
                self._block = torch.empty(size, dtype=dtype, pin_memory=pinned)
            else:
                self._block = _file_block(self.directory, size, dtype)
            self._used = 0
        self._used += count
        return self._block[self._used - count : self._used]


def _file_block(directory: str, size: int, dtype: torch.dtype) -> Tensor:
    """Room for ``size`` values in a file without a name.

    Raises:
        SlzoError: The disk has not that much room.
    """
    num_bytes = size * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(dir=directory, prefix="prefix-cache-") as file:
            if hasattr(os, "posix_fallocate"):  # a mapped file that outgrows its disk kills the process
                os.posix_fallocate(file.fileno(), 0, num_bytes)
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    except OSError as error:
        raise SlzoError(
            f"model.engine.cache_dir {directory!r}: no room for {num_bytes / 2**20:.0f} MiB more ({error.strerror}); lower "
            "model.engine.cache_gb, or give another folder"
        ) from error


def check_cache_folder(directory: str) -> None:
    """Make the folder; SlzoError if it cannot be written."""
    folder = Path(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "no write permission"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise SlzoError(f"model.engine.cache_dir {str(folder)!r}: cannot be written ({reason}); give another folder")
