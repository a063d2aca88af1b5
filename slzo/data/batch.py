"""Batches that the data loaders yield, and their planning."""

from collections.abc import Sequence
from dataclasses import dataclass

from slzo.batches.chunks import chunk_by_tokens, num_distinct_tokens, shared_beginnings
from slzo.batches.encoded import EncodedExample
from slzo.batches.layout import Movable
from slzo.batches.packing import PackedBatch, pack
from slzo.batches.sharing import share_beginnings
from slzo.tasks.base import Example

# Rows share common beginnings if that saves at least this fraction of the tokens.
_MIN_SAVING = 0.15


@dataclass(frozen=True, slots=True)
class Row:
    """An example with its tokens.

    Attributes:
        example: The text.
        encoded: Tokens of the candidates.
        position: Position in the split.
        prompt: Tokens to generate an answer from; empty for tasks with candidates.
    """

    example: Example
    encoded: EncodedExample
    position: int
    prompt: tuple[int, ...] = ()


@dataclass(frozen=True)
class TrainBatch(Movable):
    """Rows to train on; ``packed`` holds their candidates, or their gold answers only, in the order of ``rows``.

    A forward pass takes at most ``max_tokens`` tokens; ``None`` for no limit.
    """

    packed: PackedBatch
    rows: tuple[Row, ...]
    max_tokens: int | None = None


@dataclass(frozen=True)
class EvalBatch(Movable):
    """Rows to score; ``packed`` holds their candidates, in the order of ``rows``, and is ``None`` if answers are generated."""

    rows: tuple[Row, ...]
    packed: PackedBatch | None

    @property
    def examples(self) -> tuple[Example, ...]:
        """Examples of the rows."""
        return tuple(row.example for row in self.rows)


@dataclass(frozen=True, slots=True)
class EvalPlan:
    """Batches of one process.

    Attributes:
        batches: Rows of each batch.
        shares_beginnings: Whether the common beginnings of different rows in a batch are stored once.
    """

    batches: list[list[Row]]
    shares_beginnings: bool

    def pack(self, rows: Sequence[Row]) -> EvalBatch:
        """Pack one of the batches."""
        return eval_batch(rows, self.shares_beginnings)


def eval_batch(rows: Sequence[Row], shares_beginnings: bool = False) -> EvalBatch:
    """Pack rows for scoring, in the given order; for ``shares_beginnings`` see :class:`EvalPlan`."""
    if rows[0].prompt:
        return EvalBatch(tuple(rows), None)
    packed = pack([row.encoded for row in rows])
    return EvalBatch(tuple(rows), share_beginnings(packed)[0] if shares_beginnings else packed)


def plan_batches(rows: Sequence[Row], max_rows: int, max_tokens: int, rank: int = 0, world_size: int = 1) -> EvalPlan:
    """Divide the rows of this process into batches: by common beginning if that saves enough, otherwise by length.

    Args:
        rows: All rows.
        max_rows: Most rows in a batch.
        max_tokens: Most tokens in a batch, with common beginnings counted once. A longer row is a batch by itself. There is no
            limit if answers are generated: prompts run in parts then, and more rows decode faster.
        rank: Rank of this process.
        world_size: Number of processes.
    """
    sequences = [row.prompt or row.encoded.sequences[0].ids for row in rows]
    shares = num_distinct_tokens(sequences) <= (1 - _MIN_SAVING) * sum(map(len, sequences))
    if shares:
        order = sorted(range(len(rows)), key=sequences.__getitem__)
        bounds = [len(rows) * part // world_size for part in range(world_size + 1)]
        order = order[bounds[rank] : bounds[rank + 1]]
    else:
        order = sorted(range(len(rows)), key=lambda number: -len(sequences[number]))[rank::world_size]
    budget = None if any(row.prompt for row in rows) else max_tokens
    lengths = [len(sequences[number]) + _tokens_of_others(rows[number].encoded, shares) for number in order]
    shared = shared_beginnings([sequences[number] for number in order]) if shares else None
    chunks = chunk_by_tokens(lengths, budget, max_rows, shared)
    return EvalPlan([[rows[order[position]] for position in chunk] for chunk in chunks], shares)


def _tokens_of_others(encoded: EncodedExample, shares: bool) -> int:
    """Return the number of tokens that an example adds to those of its first candidate. No candidate's last token is run."""
    first, *others = encoded.sequences
    if shares:
        return num_distinct_tokens(each.ids[:-1] for each in encoded.sequences) - len(first.ids) + 1
    return sum(each.num_answer - 1 for each in others)
