"""Token ids of prompts and their answers."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class EncodedSequence:
    """A prompt followed by a candidate.

    Attributes:
        ids: Token ids of prompt and candidate, after the special tokens that the tokenizer adds in front.
        num_answer: Number of ids, at the end, that belong to the candidate (>= 1).
        counts: For each of these ids, whether it is scored and trained on; ``None`` for all. At least one is. In a conversation
            the user's messages between two answers are not.
    """

    ids: tuple[int, ...]
    num_answer: int
    counts: tuple[bool, ...] | None = None

    @property
    def places(self) -> tuple[int, ...]:
        """Positions of the scored ids, counted from the end: -1 is the last one."""
        last = range(-self.num_answer, 0)
        return tuple(last) if self.counts is None else tuple(place for place in last if self.counts[place])


@dataclass(frozen=True, slots=True)
class EncodedPrompt:
    """A prompt alone.

    Attributes:
        ids: Its token ids, after the special tokens that the tokenizer adds in front.
        cut: Whether it was too long, so that ids are missing.
    """

    ids: tuple[int, ...]
    cut: bool


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """All candidates of one example.

    Attributes:
        index: Number of the example, unique over the splits of a data set. It is the key of the prefix cache.
        sequences: One sequence per candidate, in the task's order.
        gold: Numbers of the right candidates, as in :class:`slzo.tasks.base.Example`.
        cut: Whether a sequence was too long, so that ids are missing.
    """

    index: int
    sequences: tuple[EncodedSequence, ...]
    gold: tuple[int, ...]
    cut: bool = False

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all candidates, with the prompt once."""
        first = self.sequences[0]
        return len(first.ids) - first.num_answer + sum(sequence.num_answer for sequence in self.sequences)


def prompt_alone(index: int, ids: tuple[int, ...]) -> EncodedExample:
    """Return an example with only a prompt."""
    # packing drops the last id of a sequence, which predicts nothing; a copy of it takes the place of the answer's first token
    return EncodedExample(index, (EncodedSequence((*ids, ids[-1]), 1),), ())


def prompt_with_gold(index: int, prompt: tuple[int, ...], gold: EncodedExample | None) -> EncodedExample:
    """Return an example with the prompt alone as candidate 0 and, if it is known, the gold answer as candidate 1."""
    alone = prompt_alone(index, prompt)
    if gold is None or not gold.gold:
        return alone
    return EncodedExample(index, (*alone.sequences, gold.sequences[gold.gold[0]]), (1,))


def prompt_key(index: int) -> int:
    """Return the cache key of an example's prompt alone, which differs from the key of the example with its answers."""
    return -1 - index
