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
    """The batches of the first epoch, those of every process; ``samplers`` have seen none yet."""
    for numbers in chain.from_iterable(samplers):
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
    """The prompts of the batches of the first epoch, as :func:`training_blocks`."""
    for numbers in chain.from_iterable(samplers):
        yield Block([prompt_alone(prompt_key(rows[number].encoded.index), rows[number].prompt) for number in numbers])
