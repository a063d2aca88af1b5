"""Token ids of prompts with their answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """One prompt + candidate.

    Attributes:
        ids: Token ids of prompt + candidate, special tokens as the tokenizer adds them in front.
        num_answer: How many of the last ids belong to the candidate (>= 1).
        counts: For each of these, whether it is scored and trained on, at least one is; ``None``: all are. In a conversation what
            the user says between two answers is not.
    """

    ids: tuple[int, ...]
    num_answer: int
    counts: tuple[bool, ...] | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """Where the scored ids are, counted from the end: -1 is the last one."""
        last = range(-self.num_answer, 0)
        return tuple(last) if self.counts is None else tuple(place for place in last if self.counts[place])


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """All candidates of one example.

    Attributes:
        index: Number of the example, unique over the splits of a data set; the key of the prefix cache.
        sequences: One per candidate, in the task's order.
        gold: As in :class:`slzo.tasks.base.Example`.
    """

    index: int
    sequences: tuple[EncodedSequence, ...]
    gold: tuple[int, ...]


def prompt_alone(index: int, ids: tuple[int, ...]) -> EncodedExample:
    """A prompt without an answer."""
    # the last id of a sequence predicts nothing and is dropped; a copy stands for the first answer token
    return EncodedExample(index, (EncodedSequence((*ids, ids[-1]), 1),), ())


def prompt_with_gold(index: int, prompt: tuple[int, ...], gold: EncodedExample | None) -> EncodedExample:
    """A prompt as candidate 0 and its gold answer after it, where it is known, as candidate 1."""
    alone = prompt_alone(index, prompt)
    if gold is None or not gold.gold:
        return alone
    return EncodedExample(index, (*alone.sequences, gold.sequences[gold.gold[0]]), (1,))


def prompt_key(index: int) -> int:
    """Key under which an example's prompt alone is kept, beside that of the example with its answers."""
    return -1 - index
