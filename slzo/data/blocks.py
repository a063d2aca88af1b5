"""The blocks of rows whose prefix states are computed together and cached, most used rows first."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from slzo.batches.encoded import prompt_alone, prompt_key, prompt_with_gold
from slzo.batches.packing import Block
from slzo.batches.sharing import chunk_by_tokens
from slzo.data.batch import Row

if TYPE_CHECKING:
    from slzo.task_rows import TaskRows


def prefix_blocks(rows: TaskRows) -> Iterator[Block]:
    """Yield the blocks of dev and training rows.

    The blocks are the same after a resume. They include the training rows of all processes, because each process sees other rows
    in later epochs.
    """
    plan = rows.eval_plan("dev")
    if not plan.share:  # batches with shared beginnings are not cached
        for batch in plan.batches:
            if not batch[0].prompt:
                yield Block([row.encoded for row in batch], rows.share_prompts)
    if not rows.objective.generates:
        yield from training_blocks(rows)


def prompt_blocks(rows: TaskRows) -> Iterator[Block]:
    """Like :func:`prefix_blocks`, for rows whose answers are generated; dev prompts come with their gold answers."""
    plan = rows.eval_plan("dev")
    if not plan.share:
        for batch in plan.batches:
            if batch[0].prompt:
                for chunk in chunk_by_tokens([row.prompt for row in batch], rows.scoring_tokens, share=False):
                    chosen = (batch[number] for number in chunk)
                    yield Block([prompt_with_gold(row.encoded.index, row.prompt, row.encoded) for row in chosen])
    if rows.objective.generates:
        for new in _first_rows(rows):
            yield Block([prompt_alone(prompt_key(row.encoded.index), row.prompt) for row in new])


def training_blocks(rows: TaskRows) -> Iterator[Block]:
    """Yield the training batches of all processes, with each row only in the first batch that contains it."""
    for new in _first_rows(rows):
        yield Block([row.encoded for row in new], rows.share_prompts)


def _first_rows(rows: TaskRows) -> Iterator[list[Row]]:
    """Yield each process's batches in the first epochs until all rows have been drawn, without rows of earlier batches."""
    training, seen = rows.rows("train"), set[int]()
    for epoch in range(rows.num_epochs_of_all):
        for rank in range(rows.processes.of_rows[1]):
            sampler = rows.sampler(rank=rank)
            for step in range(len(sampler)):
                numbers = sampler.rows_of_step(epoch * len(sampler) + step)
                new = [number for number in dict.fromkeys(numbers) if number not in seen]
                seen.update(new)
                if new:
                    yield [training[number] for number in new]
