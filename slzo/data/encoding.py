"""From text to token ids: which tokens belong to the answer, and what is cut when a prompt is too long."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from slzo.batches.encoded import EncodedExample, EncodedSequence
from slzo.tasks.base import Example
from slzo.utils.errors import RowError, SlzoError

DEMONSTRATION_SEPARATOR = "\n\n"


@dataclass(frozen=True, slots=True)
class _Tokens:
    ids: list[int]
    ends: list[int] | None  # for each token, where it ends in the text; only fast tokenizers know


class Encoder:
    """Token ids of prompts with their candidates.

    The candidate's tokens are those beyond the length of the tokenized prompt (MeZO), and at least all that hold a
    character of the candidate: a tokenizer may join the prompt's closing newline and the candidate in one token.
    Special tokens that the tokenizer appends at the end are taken off: no answer contains them.

    Args:
        tokenizer: The model's tokenizer.
        max_length: Longest sequence, in tokens; longer ones lose tokens on the left, but not BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 2048) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self._num_front, self._num_back = _num_specials(tokenizer)

    def encode(
        self, example: Example, index: int, demonstrations: Sequence[Example] = (), only_gold: bool = False
    ) -> EncodedExample:
        """All candidates after the prompt, or the first gold one only (training on the answer).

        Args:
            example: What to encode.
            index: Number of the example, see :class:`EncodedExample`.
            demonstrations: Solved examples to put in front of the prompt.
            only_gold: Leave out the other candidates; ``gold`` is then ``(0,)``.

        Raises:
            RowError: The answer does not fit in ``max_length``, or the prompt is empty.
            SlzoError: A label is needed and missing.
        """
        candidates, gold = example.candidates, example.gold
        if only_gold:
            candidates, gold = (_gold_answer(example),), (0,)
        self._check_prompt(example)
        texts = [example.prompt, *(example.prompt + candidate for candidate in candidates)]
        front = _demonstration_text(demonstrations)
        if front:
            texts += [front + text for text in texts[1:]]
        prompt, *answers = self._tokenize(texts)
        finals = answers[len(candidates) :] if front else answers
        sequences = []
        for candidate, answer, final in zip(candidates, answers, finals, strict=False):
            count = _num_answer(prompt, answer, len(example.prompt))
            self._check_answer(example, candidate, count, len(answer.ids))
            sequences.append(EncodedSequence(self._cut(final.ids, self.max_length), count))
        return EncodedExample(index, tuple(sequences), gold)

    def encode_prompt(
        self, example: Example, demonstrations: Sequence[Example] = (), max_new_tokens: int = 50
    ) -> tuple[int, ...]:
        """The prompt alone, at most ``max_length - max_new_tokens`` tokens, for generation.

        Raises:
            SlzoError: No room is left for the prompt, or it is empty.
        """
        self._check_prompt(example)
        room = self.max_length - max_new_tokens
        if room <= self._num_front:
            raise SlzoError(
                f"data.max_length {self.max_length}: leaves no room for a prompt beside {max_new_tokens} new tokens;"
                " raise it"
            )
        return self._cut(self._tokenize([_demonstration_text(demonstrations) + example.prompt])[0].ids, room)

    def _check_prompt(self, example: Example) -> None:
        if not example.prompt.strip():
            raise RowError(f"{example.told}: the prompt is empty; give its fields some text")

    def _check_answer(self, example: Example, candidate: str, count: int, length: int) -> None:
        shown = repr(candidate if len(candidate) <= 40 else f"{candidate[:37]}...")
        if count < 1:
            raise RowError(f"{example.told}: the tokenizer makes no token of answer {shown}; change the answer")
        if count >= length:
            raise RowError(
                f"{example.told}: the tokenizer joins the whole prompt with answer {shown}; no token is left to "
                "predict it from: use a longer prompt"
            )
        # At least one token must come before the answer, to predict its first token from.
        needed = count + max(self._num_front, 1)
        if needed > self.max_length:
            raise RowError(
                f"data.max_length {self.max_length}: the answer {shown} of {example.told} needs {needed} tokens"
                " with the one before it; raise it, or leave out the example"
            )

    def _cut(self, ids: list[int], length: int) -> tuple[int, ...]:
        if len(ids) <= length:
            return tuple(ids)
        kept = length - self._num_front
        return (*ids[: self._num_front], *ids[len(ids) - kept :])

    def _tokenize(self, texts: list[str]) -> list[_Tokens]:
        is_fast = self.tokenizer.is_fast
        # verbose=False: too long sequences are cut later, a warning would mislead.
        batch = self.tokenizer(texts, return_offsets_mapping=is_fast, verbose=False)
        offsets = batch["offset_mapping"] if is_fast else [None] * len(texts)
        return [
            _Tokens(
                ids[: len(ids) - self._num_back],
                None if spans is None else [end for _, end in spans[: len(ids) - self._num_back]],
            )
            for ids, spans in zip(batch["input_ids"], offsets, strict=True)
        ]


def newline_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """The one token that a newline after a word becomes, ``None`` if it is not one token of its own."""
    word, line = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a\n"))
    if len(line) != len(word) + 1 or line[:-1] != word or line[-1] == tokenizer.unk_token_id:
        return None
    return int(line[-1])


def _num_answer(prompt: _Tokens, full: _Tokens, prompt_length: int) -> int:
    beyond = len(full.ids) - len(prompt.ids)
    if full.ids == prompt.ids:
        return 0
    if full.ends is not None:
        touched = sum(end > prompt_length for end in full.ends)
    else:
        same = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(prompt.ids, full.ids, strict=False)))
        touched = len(full.ids) - same
    return max(beyond, touched)


def _num_specials(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """How many special tokens the tokenizer puts before and after a text."""
    for probe in "a0.":
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return start, len(full) - start - len(plain)
    return 0, 0


def _gold_answer(example: Example) -> str:
    if not example.gold:
        raise SlzoError(f"{example.told}: has no label; training and demonstrations need labelled rows")
    return example.candidates[example.gold[0]]


def _demonstration_text(demonstrations: Sequence[Example]) -> str:
    solved = [(example.prompt + _gold_answer(example)).strip() for example in demonstrations]
    return "".join(text + DEMONSTRATION_SEPARATOR for text in solved)
