"""Batches that store the common beginnings of rows once, for example one paragraph with many questions."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from slzo.batches.layout import build_layout
from slzo.batches.packing import PackedBatch


def share_beginnings(batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
    """Store, and so evaluate, every common beginning of a batch's sequences once.

    The result is the same, because the hidden state of a token depends only on the tokens before it. The tokens no longer belong
    to single examples: ``example_tokens`` is empty, and the hidden states must not be cached by example. The batch must be on the
    CPU.

    Returns:
        The new batch, and the position of each of its T tokens in ``batch``, shape (T,), int64.
    """
    ids = batch.input_ids.tolist()
    merged = [-1] * len(ids)
    kept: list[int] = []
    nodes: dict[tuple[int, int], int] = {}  # a trie: node by parent and token id
    paths: dict[int, tuple[int, ...]] = {}
    inner: set[int] = set()
    for positions in batch.layout.sequences():
        path: list[int] = []
        for position in positions:
            parent = path[-1] if path else -1
            if merged[position] < 0:
                merged[position] = nodes.setdefault((parent, ids[position]), len(kept))
                if merged[position] == len(kept):
                    kept.append(position)
            path.append(merged[position])
        paths[path[-1]] = tuple(path)
        inner.update(path[:-1])
    # a sequence that is the beginning of another one needs no separate attention
    sequences = [path for last, path in paths.items() if last not in inner]
    source = torch.tensor(kept)
    shared = replace(
        batch,
        input_ids=batch.input_ids[source],
        position_ids=batch.position_ids[source],
        layout=build_layout(sequences, len(kept), grouped=True),
        example_tokens=(),
        needed=torch.tensor(merged)[batch.needed],
    )
    return shared, source


def chunk_by_tokens(
    sequences: Sequence[Sequence[int]], max_tokens: int | None, max_rows: int | None = None, *, share: bool = True
) -> list[list[int]]:
    """Cut sequences of token ids, in order, into chunks of at most ``max_tokens`` tokens and ``max_rows`` sequences.

    Returns the numbers of the sequences in each chunk. A longer sequence is a separate chunk, and ``None`` is no limit. With
    ``share``, tokens that a sequence has in common with the one before it are not counted again.
    """
    chunks: list[list[int]] = []
    used = 0
    for number, sequence in enumerate(sequences):
        new = len(sequence) - (_common(sequences[number - 1], sequence) if share and number else 0)
        full = not chunks or (max_rows is not None and len(chunks[-1]) >= max_rows)
        if full or (max_tokens is not None and used + new > max_tokens):
            chunks.append([number])
            used = len(sequence)
        else:
            chunks[-1].append(number)
            used += new
    return chunks


def num_distinct_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """Return the number of tokens of the sequences, with common beginnings counted once."""
    ordered = sorted(map(tuple, sequences))
    return sum(map(len, ordered)) - sum(_common(first, second) for first, second in pairwise(ordered))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
