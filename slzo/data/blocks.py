"""With which other rows each row's prefix is computed: the batch in which a run that nobody stops sees it first."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from slzo.batches.blocks import Block
from slzo.batches.encoded import prompt_alone, prompt_key, prompt_with_gold
from slzo.batches.sharing import chunk_by_tokens
from slzo.data.batch import EvalPlan, Row
from slzo.data.sampler import EpochBatchSampler


def evaluation_blocks(plan: EvalPlan, share_prompts: bool) -> Iterator[Block]:
    """The batches that dev rows are scored in; none where they share beginnings, or generate, and nothing is kept of a row."""
    if plan.share:
        return
    for rows in plan.batches:
        if not rows[0].prompt:
            yield Block([row.encoded for row in rows], share_prompts)


def training_blocks(rows: Sequence[Row], samplers: Iterable[EpochBatchSampler], share_prompts: bool) -> Iterator[Block]:
    """The batches in which the rows come first, those of every process, in the order of the samplers; each row once."""
    for numbers in _first_batches(samplers):
        yield Block([rows[number].encoded for number in numbers], share_prompts)


def evaluation_prompts(plan: EvalPlan, max_tokens: int) -> Iterator[Block]:
    """Prompts of dev rows whose answers are generated, their gold answers after them, in parts of so many tokens.

    None where they share beginnings: computing these once saves more.
    """
    if plan.share:
        return
    for rows in plan.batches:
        prompts = [row.prompt for row in rows]
        for chunk in chunk_by_tokens(prompts, max_tokens, share=False) if all(prompts) else ():
            yield Block([prompt_with_gold(rows[n].encoded.index, rows[n].prompt, rows[n].encoded) for n in chunk])


def training_prompts(rows: Sequence[Row], samplers: Iterable[EpochBatchSampler]) -> Iterator[Block]:
    """The prompts of these batches, as :func:`training_blocks`."""
    for numbers in _first_batches(samplers):
        yield Block([prompt_alone(prompt_key(rows[number].encoded.index), rows[number].prompt) for number in numbers])


def _first_batches(samplers: Iterable[EpochBatchSampler]) -> Iterator[list[int]]:
    """Row numbers of batches, without those that an earlier one had, as balanced classes may."""
    seen: set[int] = set()
    for numbers in chain.from_iterable(samplers):
        new = [number for number in dict.fromkeys(numbers) if number not in seen]
        seen.update(new)
        if new:
            yield new
