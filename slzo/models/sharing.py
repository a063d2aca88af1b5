"""Batches in which rows that start alike share that start: one paragraph, many questions."""

from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import takewhile

import torch

from slzo.models.packing import PackedBatch, PackedLayout


def share_prefixes(batch: PackedBatch) -> PackedBatch:
    """The batch with every common beginning of its sequences stored, and thus evaluated, once.

    A token's hidden state depends on the tokens before it only, so the result is the same. The tokens no longer belong to
    single examples: ``example_tokens`` is empty, and the hidden states must not be cached by example.

    Args:
        batch: As :func:`slzo.models.packing.pack` makes it.
    """
    ids = batch.input_ids.tolist()
    merged = [-1] * len(ids)
    kept: list[int] = []
    nodes: dict[tuple[int, int], int] = {}
    for group, valid in zip(batch.layout.groups, batch.layout.valid, strict=True):
        for places, length in zip(group.tolist(), valid.sum(dim=1).tolist(), strict=True):
            parent = -1
            for place in places[:length]:
                if merged[place] < 0:
                    node = nodes.setdefault((parent, ids[place]), len(kept))
                    merged[place] = node
                    if node == len(kept):
                        kept.append(place)
                parent = merged[place]
    if len(kept) == len(ids):
        return replace(batch, example_tokens=())
    target, source = torch.tensor(merged), torch.tensor(kept)
    layout = PackedLayout(
        groups=tuple(target[group] for group in batch.layout.groups),
        valid=batch.layout.valid,
        inverse=batch.layout.inverse[source],
    )
    return replace(
        batch,
        input_ids=batch.input_ids[source],
        position_ids=batch.position_ids[source],
        layout=layout,
        example_tokens=(),
        rows=target[batch.rows],
    )


def chunk_by_tokens(sequences: Sequence[Sequence[int]], max_tokens: int) -> list[list[int]]:
    """Sequence numbers in chunks of few distinct tokens, those with a common beginning together.

    Args:
        sequences: Token ids.
        max_tokens: Tokens of a chunk, common beginnings counted once; a longer sequence is a chunk of its own.
    """
    order = sorted(range(len(sequences)), key=lambda number: tuple(sequences[number]))
    chunks: list[list[int]] = []
    used = 0
    for number in order:
        new = len(sequences[number])
        if chunks:
            new -= _common(sequences[chunks[-1][-1]], sequences[number])
        if chunks and used + new <= max_tokens:
            chunks[-1].append(number)
            used += new
        else:
            chunks.append([number])
            used = len(sequences[number])
    return chunks


def _common(first: Iterable[int], second: Iterable[int]) -> int:
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
