"""Batches in which rows that start alike share that start: one paragraph, many questions."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import pairwise, takewhile

import torch
from torch import Tensor

from slzo.batches.layout import build_layout
from slzo.batches.packing import PackedBatch


def share_beginnings(batch: PackedBatch) -> PackedBatch:
    """A packed batch with every common beginning of its sequences stored, and thus evaluated, once.

    A token's hidden state depends on the tokens before it only, so the result is the same. The tokens no longer belong to
    single examples: ``example_tokens`` is empty, and the hidden states must not be cached by example.
    """
    return common_beginnings(batch)[0]


def common_beginnings(batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
    """The same, and where each of its tokens is in the given batch, shape (tokens,), int64; on the CPU."""
    ids = batch.input_ids.tolist()
    merged = [-1] * len(ids)
    kept: list[int] = []
    nodes: dict[tuple[int, int], int] = {}
    paths: dict[int, tuple[int, ...]] = {}
    inner: set[int] = set()
    for places in batch.layout.sequences():
        path: list[int] = []
        for place in places:
            parent = path[-1] if path else -1
            if merged[place] < 0:
                merged[place] = nodes.setdefault((parent, ids[place]), len(kept))
                if merged[place] == len(kept):
                    kept.append(place)
            path.append(merged[place])
        paths[path[-1]] = tuple(path)
        inner.update(path[:-1])
    # a sequence that another one begins with needs no attention of its own
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
    """Places of consecutive sequences of token ids, cut into chunks of at most so many tokens and rows; ``None`` for no limit.

    A longer sequence is a chunk of its own. ``share`` counts what a sequence has in common with the one before it once.
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
    """Tokens of the sequences, common beginnings counted once."""
    ordered = sorted(map(tuple, sequences))
    return sum(map(len, ordered)) - sum(_common(first, second) for first, second in pairwise(ordered))


def _common(first: Sequence[int], second: Sequence[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
