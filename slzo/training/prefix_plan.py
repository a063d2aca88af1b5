"""Which rows have their states below the tuned layer cached, and which of them are computed together."""

from collections.abc import Iterator, Sequence
from itertools import chain

from slzo.batches.chunks import chunk_by_tokens
from slzo.batches.encoded import prompt_alone, prompt_key, prompt_with_gold
from slzo.batches.packing import Block
from slzo.data.batch import Row
from slzo.task_data import TaskData
from slzo.zo.shared_prefix import SharedPrefix
from slzo.zo.tuned_model import TunedModel


def plan_prefix(model: TunedModel, data: TaskData, held_out: bool = False) -> None:
    """Decide which rows have their prefix states cached, and which rows are computed together; see :func:`prefix_blocks`."""
    model.plan_prefix(prefix_blocks(data, held_out), prompt_blocks(data))


def prefix_blocks(data: TaskData, held_out: bool = False) -> Iterator[Block]:
    """Yield the blocks of dev and training rows, and with ``held_out`` those of held-out rows.

    The blocks are the same after a resume. They include the training rows of all processes, because each process sees different
    rows in later epochs.
    """
    yield from map(_block, _scored(data, "dev", generated=False))
    if not data.objective.generates:
        yield from chain.from_iterable(training_blocks(data))
    if held_out:
        yield from map(_block, _scored(data, "test", generated=False))


def _scored(data: TaskData, split: str, generated: bool) -> list[list[Row]]:
    """Return the batches in which this process scores a split: those whose answers are generated, or the others."""
    plan = data.eval_plan(split)
    # batches with shared beginnings are not cached
    return [] if plan.shares_beginnings else [batch for batch in plan.batches if bool(batch[0].prompt) == generated]


def _block(batch: Sequence[Row]) -> Block:
    return Block([row.encoded for row in batch])


def fill_prefix(model: TunedModel, data: TaskData) -> None:
    """Compute the states of every row for which the cache has room; :func:`plan_prefix` comes first."""
    for block in prefix_blocks(data):
        model.forward.prefix(block.pack().to(model.parts.model.device))


def prompt_blocks(data: TaskData) -> Iterator[Block]:
    """Like :func:`prefix_blocks`, for rows whose answers are generated; dev prompts come with their gold answers."""
    for batch in _scored(data, "dev", generated=True):
        for chunk in chunk_by_tokens([len(row.prompt) for row in batch], data.scoring_tokens):
            chosen = (batch[number] for number in chunk)
            yield Block([prompt_with_gold(row.encoded.index, row.prompt, row.encoded) for row in chosen])
    if data.objective.generates:
        for batch in chain.from_iterable(_first_epoch(data)):
            yield Block([prompt_alone(prompt_key(row.encoded.index), row.prompt) for row in batch])


def training_blocks(data: TaskData) -> list[list[Block]]:
    """Return the training batches of the first epoch, by process."""
    return [[*map(_block, batches)] for batches in _first_epoch(data)]


def _first_epoch(data: TaskData) -> list[list[list[Row]]]:
    """Return the rows of the batches of the first epoch, by process."""
    return [list(data.sampler(rank=rank)) for rank in range(data.processes.row_partition.total)]


def shared_prefix(model: TunedModel, data: TaskData) -> SharedPrefix | None:
    """Return how processes send prefix states to each other; ``None`` if they have no states of training rows to send."""
    partition = data.processes.row_partition
    span = model.span
    if partition.total == 1 or span.start == 0 or data.objective.generates or not model.engine.share_prefix:
        return None
    return SharedPrefix(model.forward, training_blocks(data), partition.rank)
