"""With which other rows each row's prefix is computed: the batch in which a run that nobody stops sees it first."""

from collections.abc import Iterable, Iterator, Sequence
from itertools import chain

from slzo.batches.blocks import Block
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
