"""Batches that store the common beginnings of rows once, for example one paragraph with many questions."""

from dataclasses import replace

import torch
from torch import Tensor

from slzo.batches.layout import build_layout
from slzo.batches.packing import PackedBatch


def share_beginnings(batch: PackedBatch) -> tuple[PackedBatch, Tensor]:
    """Merge the common beginnings of a batch's sequences, so that each is stored and computed once.

    The result is the same, because the hidden state of a token depends only on the tokens before it. The result
    ``shares_tokens``, so its hidden states must not be cached by example. The batch must be on the CPU.

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
        layout=build_layout(sequences, len(kept)),
        examples=(),
        example_tokens=(),
        shares_tokens=True,
        logit_positions=torch.tensor(merged)[batch.logit_positions],
    )
    return shared, source
