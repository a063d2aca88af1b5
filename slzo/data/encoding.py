"""From text to token ids: which tokens belong to the answer, and what is cut when a prompt is too long."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """One prompt + candidate.

    Attributes:
        ids: Token ids of prompt + candidate, special tokens as the tokenizer adds them.
        num_answer: How many of the last ids belong to the candidate (>= 1).
    """

    ids: tuple[int, ...]
    num_answer: int


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """All candidates of one example.

    Attributes:
        index: Position of the example in its split; the key of the prefix cache.
        sequences: One per candidate, in the task's order.
        gold: As in :class:`slzo.tasks.base.Example`.
    """

    index: int
    sequences: tuple[EncodedSequence, ...]
    gold: tuple[int, ...]
