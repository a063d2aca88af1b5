"""Cache of the hidden states that enter the tuned layer, by example. The layers before it never change."""

import os
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from slzo.batches.packing import Block, PackedBatch, TokenBatch
from slzo.utils.errors import SlzoError
from slzo.utils.files import expanded

_BLOCK_BYTES = 64 * 2**20
# An example larger than this share of a block gets its own allocation.
_LARGEST_SHARE = 1 / 8


class PrefixCache:
    """Stores hidden states by example until the budget is used up. All other states are recomputed each time.

    Apart from rounding, the packed hidden states of an example do not depend on its batch, so any later batch can use them.
    With a :meth:`plan` they do not depend on the batch at all.

    Args:
        start: Number of the layer that the states enter.
        budget_gb: Size limit in GiB; 0 disables the cache.
        directory: Folder for an unnamed memory-mapped file, which replaces memory. It disappears with the process.
        primary: Cache that shares this one's budget and has priority. This cache uses only what it leaves; ``None`` for the
            whole budget.

    Raises:
        SlzoError: The folder cannot be written.
    """

    def __init__(
        self, start: int, budget_gb: float, directory: str | None = None, primary: "PrefixCache | None" = None
    ) -> None:
        self.start = start
        self.budget = int(budget_gb * 2**30)
        self.directory = directory
        if directory is not None:
            check_cache_folder(directory)
        self.primary = primary
        self.num_bytes = 0
        self._states: dict[int, Tensor] = {}
        self._plan: dict[int, Block] | None = None
        self._planned = 0
        self._block: Tensor | None = None
        self._used = 0

    def __contains__(self, key: int) -> bool:
        return key in self._states

    def __getstate__(self) -> dict[str, object]:
        """Leave the states out of copies and pickles, in which each would bring its whole block; they are computed again."""
        return {**vars(self), "_states": {}, "_block": None, "_used": 0, "num_bytes": 0}

    def plan(self, blocks: Iterable[Block], token_bytes: int) -> None:
        """Choose the examples to store and the examples that each is computed with: whole blocks, in this order, that still fit.

        The states are then the same in every run with the same blocks and budget, regardless of earlier requests. A cache that
        holds an example outside the plan is cleared.

        Args:
            blocks: The planned batches; each example is in at most one of them.
            token_bytes: Bytes that the states of one packed token take.
        """
        self._plan, self._planned = {}, 0
        for block in blocks:
            size = block.num_tokens * token_bytes
            if self._planned + size <= self._limit:
                self._planned += size
                self._plan |= dict.fromkeys(block.keys, block)
        if not self._states.keys() <= self._plan.keys():
            self._clear()

    def wants(self, key: int) -> bool:
        """Whether the states of an example are to be stored; without a plan those of any, as far as they fit."""
        return self.num_bytes < self._limit if self._plan is None else key in self._plan

    @property
    def _limit(self) -> int:
        """Bytes of the budget that ``primary`` leaves to this cache."""
        return self.budget - (0 if self.primary is None else max(self.primary.num_bytes, self.primary._planned))

    def get_or_compute(
        self, batch: PackedBatch, run: Callable[[TokenBatch], Tensor], keep: bool, max_tokens: int | None
    ) -> Tensor:
        """Return the states of a batch, shape (T, hidden).

        Only those of missing examples are computed, by ``run``, for at most ``max_tokens`` tokens at once; ``None`` is no limit.
        With a limit, the examples must not share tokens. With ``keep``, the new states are stored, and a planned example is
        computed together with the rest of its block.
        """
        keys, device = batch.example_index, batch.input_ids.device
        if keep:
            plan = self._plan or {}
            blocks = {id(plan[key]): plan[key] for key in keys if key in plan and key not in self}
            for block in blocks.values():
                if block.keys != keys:  # otherwise the batch is the block, and is computed below
                    packed = block.pack().to(device)
                    states = run_in_pieces(run, packed, max_tokens)
                    self.put(packed.example_index, packed.example_tokens, states)
        missing = [number for number, key in enumerate(keys) if key not in self]
        if not missing:
            return self.gather(keys, {}, device)
        fresh = run_in_pieces(run, batch if len(missing) == batch.num_examples else batch.select(missing), max_tokens)
        lengths = [batch.example_tokens[number] for number in missing]
        if keep:
            self.put([keys[number] for number in missing], lengths, fresh)
        if len(missing) == batch.num_examples:
            return fresh
        new = dict(zip(missing, fresh.split(lengths), strict=True))
        return self.gather(keys, new, device)

    def gather(self, keys: Sequence[int], new: Mapping[int, Tensor], device: torch.device) -> Tensor:
        """Concatenate the states of examples, shape (T, hidden); ``new`` holds uncached ones by their position in ``keys``."""
        pieces = [
            new[position] if position in new else self._states[key].to(device, non_blocking=True)
            for position, key in enumerate(keys)
        ]
        return torch.cat(pieces)

    def put(self, keys: Sequence[int], lengths: Sequence[int], hidden: Tensor) -> None:
        """Store hidden states (T, hidden) as far as they fit; an example is given by its key and its number of packed tokens."""
        for key, states in zip(keys, hidden.split(tuple(lengths)), strict=True):
            size = states.nbytes
            if key in self or not self.wants(key) or self.num_bytes + size > self._limit:
                continue
            storage = self._allocate(states.numel(), states.dtype, pinned=states.is_cuda)
            self._states[key] = storage.copy_(states.detach().flatten()).view(states.shape)
            self.num_bytes += size

    def _clear(self) -> None:
        """Remove all states."""
        self._states.clear()
        self._block, self._used, self.num_bytes = None, 0, 0

    def reset(self) -> None:
        """Remove all states and the plan, whose keys are valid for one data module only."""
        self._clear()
        self._plan, self._planned = None, 0

    def _allocate(self, count: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        """Reserve ``count`` values: in the current block, in a new one, or, if they are many, in a block of their own."""
        size = max(count, min(_BLOCK_BYTES, self.budget) // dtype.itemsize)
        # the rest of a block that cannot take them would be lost; torch rounds pinned memory up to powers of two
        if not pinned and count > _LARGEST_SHARE * size:
            return self._new_block(count, dtype, pinned)
        if self._block is None or self._used + count > self._block.numel():
            self._block, self._used = self._new_block(size, dtype, pinned), 0
        self._used += count
        return self._block[self._used - count : self._used]

    def _new_block(self, size: int, dtype: torch.dtype, pinned: bool) -> Tensor:
        if self.directory is not None:
            return _file_block(self.directory, size, dtype)
        return torch.empty(size, dtype=dtype, pin_memory=pinned)  # copies from pinned memory are asynchronous


def run_in_pieces(run: Callable[[TokenBatch], Tensor], batch: PackedBatch, max_tokens: int | None) -> Tensor:
    """Compute the states of a batch in parts, shape (T, hidden)."""
    states = [run(part) for part in batch.cut(max_tokens)]
    return states[0] if len(states) == 1 else torch.cat(states)


def _file_block(directory: str, size: int, dtype: torch.dtype) -> Tensor:
    """Return a tensor of ``size`` values in a file without a name.

    Raises:
        SlzoError: The disk is full.
    """
    num_bytes = size * dtype.itemsize
    try:
        with tempfile.NamedTemporaryFile(dir=expanded(directory), prefix="prefix-cache-") as file:
            os.posix_fallocate(file.fileno(), 0, num_bytes)  # writing to a mapped file on a full disk kills the process
            return torch.from_file(file.name, shared=True, size=size, dtype=dtype)
    except OSError as error:
        raise SlzoError(
            f"model.engine.cache_dir {directory!r}: no room for {num_bytes / 2**20:.0f} MiB more ({error.strerror}); lower "
            "model.engine.cache_gb, or give another folder"
        ) from error


def check_cache_folder(directory: str) -> None:
    """Create the folder; raise SlzoError if it cannot be written."""
    folder = expanded(directory)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        reason = "" if os.access(folder, os.W_OK) else "no write permission"
    except OSError as error:
        reason = error.strerror or str(error)
    if reason:
        raise SlzoError(f"model.engine.cache_dir {str(folder)!r}: cannot be written ({reason}); give another folder")
