"""Cut rows into chunks of a limited number of tokens."""

from collections.abc import Iterable, Sequence
from itertools import pairwise, takewhile


def chunk_by_tokens(
    sequences: Sequence[Sequence[int]],
    max_tokens: int | None,
    max_rows: int | None = None,
    *,
    share: bool = True,
    more: Sequence[int] | None = None,
) -> list[list[int]]:
    """Cut sequences of token ids, in order, into chunks of at most ``max_tokens`` tokens and ``max_rows`` sequences.

    Returns the numbers of the sequences in each chunk. A longer sequence is a separate chunk, and ``None`` is no limit. With
    ``share``, tokens that a sequence has in common with the one before it are not counted again. ``more`` is the number of
    further tokens that come with each sequence.
    """
    chunks: list[list[int]] = []
    used = 0
    for number, sequence in enumerate(sequences):
        length = len(sequence) + (more[number] if more is not None else 0)
        new = length - (_common(sequences[number - 1], sequence) if share and number else 0)
        full = not chunks or (max_rows is not None and len(chunks[-1]) >= max_rows)
        if full or (max_tokens is not None and used + new > max_tokens):
            chunks.append([number])
            used = length
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
