"""Cut rows into chunks of a limited number of tokens."""

from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile


def chunk_by_tokens(
    lengths: Sequence[int], max_tokens: int | None, max_rows: int | None = None, shared: Sequence[int] | None = None
) -> list[list[int]]:
    """Cut sequences, in order, into chunks of limited size; return the numbers of the sequences in each; ``None`` is no limit.

    Args:
        lengths: Number of tokens of each sequence. A sequence of more than ``max_tokens`` is a chunk by itself.
        max_tokens: Most tokens of a chunk.
        max_rows: Most sequences of a chunk.
        shared: How many tokens of each sequence are not counted if the sequence before it is in the same chunk.
    """
    chunks: list[list[int]] = []
    used = 0
    for number, length in enumerate(lengths):
        new = length if shared is None else length - shared[number]
        full = not chunks or (max_rows is not None and len(chunks[-1]) >= max_rows)
        if full or (max_tokens is not None and used + new > max_tokens):
            chunks.append([number])
            used = length
        else:
            chunks[-1].append(number)
            used += new
    return chunks


def shared_beginnings(sequences: Sequence[Sequence[int]]) -> list[int]:
    """Return how many leading tokens each sequence has in common with the one before it; 0 for the first."""
    return [0, *(num_common(first, second) for first, second in pairwise(sequences))][: len(sequences)]


def num_distinct_tokens(sequences: Iterable[Sequence[int]]) -> int:
    """Return the number of tokens of the sequences, with common beginnings counted once."""
    ordered = sorted(map(tuple, sequences))
    return sum(map(len, ordered)) - sum(shared_beginnings(ordered))


def num_common(first: Sequence[int], second: Sequence[int]) -> int:
    """Return how many leading tokens two sequences have in common."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(first, second, strict=False)))
