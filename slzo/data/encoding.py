"""Tokenization of prompts with answers: which tokens belong to the answer, and the truncation of long prompts."""

import copy
from collections.abc import Sequence
from typing import NamedTuple, Self

from transformers import PreTrainedTokenizerBase

from slzo.batches.chunks import num_common
from slzo.batches.encoded import EncodedExample, EncodedPrompt, EncodedSequence
from slzo.tasks.base import MAX_NEW_TOKENS, Example
from slzo.utils.errors import RowError, SlzoError

DEMONSTRATION_SEPARATOR = "\n\n"


class _Tokens(NamedTuple):
    ids: list[int]
    ends: list[int] | None  # end of each token in the text; only fast tokenizers know it


class Encoder:
    """Encodes prompts with their candidates.

    The candidate's tokens are those beyond the length of the tokenized prompt (MeZO), and at least all that contain a
    character of the candidate: a tokenizer may join the prompt's last newline and the candidate in one token.
    Special tokens that the tokenizer appends at the end are removed, because they are not part of the answer.

    Args:
        tokenizer: The model's tokenizer.
        max_length: Longest sequence, in tokens. Longer sequences are truncated on the left, but keep BOS.

    Attributes:
        num_back: Number of special tokens that the tokenizer appends to a text; they are removed.
        num_embeddings: Number of tokens that the model has; ``None`` if it is not known.
        limited_by_model: Whether ``max_length`` is all that the model takes.
        note: Sentence for the log if conversations are put in a template that is not the tokenizer's, else ``None``.
        template: The chat template.
        stop: Texts that end a generated answer.
        lead: Tokens that a chat template writes before each answer, after the prompt: an empty reasoning (Qwen3), or a channel.
        shortening: How sequences that are too long are shortened, for a message.
    """

    note: str | None = None
    template: str | None = None
    stop: tuple[str, ...] = ()
    lead: tuple[int, ...] = ()
    shortening = "cut on the left, so the start of the prompt is missing"

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int = 2048) -> None:
        self.tokenizer = tokenizer
        self.max_length = max_length
        self.num_embeddings: int | None = None
        self.limited_by_model = False
        self._num_front, self.num_back = _num_specials(tokenizer)

    def limited_to(self, max_length: int, num_embeddings: int | None, by_model: bool) -> Self:
        """Return the same encoder with the limits of a model; ``by_model`` says whether ``max_length`` is one of them."""
        limited = copy.copy(self)
        limited.max_length = max_length
        limited.num_embeddings = num_embeddings
        limited.limited_by_model = by_model
        return limited

    @property
    def length_advice(self) -> str:
        """What to do about a sequence that is too long."""
        return "use a model that takes longer sequences" if self.limited_by_model else "raise it"

    def encode(
        self, example: Example, index: int, demonstrations: Sequence[Example] = (), only_gold: bool = False
    ) -> EncodedExample:
        """Encode the prompt with all candidates, or with the first gold candidate only (training on the answer).

        Args:
            example: Example to encode.
            index: Number of the example, see :class:`EncodedExample`.
            demonstrations: Solved examples to put before the prompt.
            only_gold: Leave out the other candidates; ``gold`` is then ``(0,)``.

        Raises:
            RowError: The answer does not fit in ``max_length``, or two candidates have the same tokens.
            SlzoError: A required label is missing.
        """
        candidates, gold = example.candidates, example.gold
        if only_gold:
            candidates, gold = (_gold_answer(example),), (0,)
        texts = [example.prompt, *(example.prompt + candidate for candidate in candidates)]
        front = _demonstration_text(demonstrations)
        if front:
            texts += [front + text for text in texts[1:]]
        prompt, *answers = self._tokenize(texts)
        finals = answers[len(candidates) :] if front else answers
        sequences = []
        any_cut = False
        for candidate, answer, final in zip(candidates, answers, finals, strict=False):
            count = _num_answer(prompt, answer, len(example.prompt))
            self._check_answer(example, candidate, count, len(answer.ids))
            ids, cut = self._cut(final.ids, self.max_length)
            sequences.append(EncodedSequence(ids, count))
            any_cut |= cut
        _check_distinct(example, candidates, sequences)
        return EncodedExample(index, tuple(sequences), gold, any_cut)

    def encode_prompt(
        self, example: Example, demonstrations: Sequence[Example] = (), max_new_tokens: int = MAX_NEW_TOKENS
    ) -> EncodedPrompt:
        """Encode the prompt for generation, with at most ``max_length - max_new_tokens`` tokens.

        Raises:
            SlzoError: No room is left for the prompt.
        """
        room = self.max_length - max_new_tokens
        if room <= self._num_front:
            raise SlzoError(
                f"data.max_length {self.max_length}: leaves no room for a prompt with {max_new_tokens} new tokens; "
                f"{self.length_advice}"
            )
        whole = self._tokenize([_demonstration_text(demonstrations) + example.prompt])[0]
        return EncodedPrompt(*self._cut(whole.ids, room))

    def _check_answer(self, example: Example, candidate: str, count: int, length: int) -> None:
        shown = repr(candidate if len(candidate) <= 40 else f"{candidate[:37]}...")
        if count < 1:
            raise RowError(f"{example.location}: the tokenizer makes no tokens from answer {shown}; change the answer")
        if count >= length:
            raise RowError(
                f"{example.location}: the tokenizer joins the whole prompt with answer {shown}, so no token is left "
                "to predict it from; use a longer prompt"
            )
        # At least one token must come before the answer, to predict its first token from.
        needed = count + max(self._num_front, 1)
        if needed > self.max_length:
            raise RowError(
                f"data.max_length {self.max_length}: the answer {shown} of {example.location} needs {needed} tokens,"
                f" including the one before it; {self.length_advice}, or leave out the example"
            )

    def _cut(self, ids: list[int], length: int) -> tuple[tuple[int, ...], bool]:
        """Return at most ``length`` ids, and whether others are missing."""
        if len(ids) <= length:
            return tuple(ids), False
        kept = length - self._num_front
        return (*ids[: self._num_front], *ids[len(ids) - kept :]), True

    def _tokenize(self, texts: list[str]) -> list[_Tokens]:
        is_fast = self.tokenizer.is_fast
        # verbose=False: long sequences are truncated later, so a warning would be misleading
        batch = self.tokenizer(texts, return_offsets_mapping=is_fast, verbose=False)
        offsets = batch["offset_mapping"] if is_fast else [None] * len(texts)
        return [
            _Tokens(
                ids[: len(ids) - self.num_back],
                None if spans is None else [end for _, end in spans[: len(ids) - self.num_back]],
            )
            for ids, spans in zip(batch["input_ids"], offsets, strict=True)
        ]


def newline_token(tokenizer: PreTrainedTokenizerBase) -> int | None:
    """Return the token of a newline after a word, ``None`` if it is not a separate single token."""
    word, line = (tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("a", "a\n"))
    if len(line) != len(word) + 1 or line[:-1] != word or line[-1] == tokenizer.unk_token_id:
        return None
    return int(line[-1])


def _num_answer(prompt: _Tokens, full: _Tokens, prompt_length: int) -> int:
    if full.ids == prompt.ids:
        return 0
    if full.ends is not None:
        touched = sum(end > prompt_length for end in full.ends)
    else:
        touched = len(full.ids) - num_common(prompt.ids, full.ids)
    return max(len(full.ids) - len(prompt.ids), touched)


def _num_specials(tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Return how many special tokens the tokenizer adds before and after a text."""
    for probe in "a0.":
        plain = tokenizer(probe, add_special_tokens=False)["input_ids"]
        full = tokenizer(probe)["input_ids"]
        for start in range(len(full) - len(plain) + 1):
            if plain and full[start : start + len(plain)] == plain:
                return start, len(full) - start - len(plain)
    return 0, 0


def _check_distinct(example: Example, candidates: Sequence[str], sequences: Sequence[EncodedSequence]) -> None:
    """Raise RowError if two candidates have the same tokens, and so always the same score."""
    first: dict[EncodedSequence, str] = {}
    for candidate, sequence in zip(candidates, sequences, strict=True):
        other = first.setdefault(sequence, candidate)
        if other is not candidate:
            raise RowError(
                f"{example.location}: the tokenizer makes the same tokens from the candidates {other!r} and {candidate!r}, so "
                "they cannot be told apart; change one of them"
            )


def _gold_answer(example: Example) -> str:
    if not example.gold:
        raise SlzoError(f"{example.location}: has no label; training and demonstrations need labelled rows")
    return example.candidates[example.gold[0]]


def _demonstration_text(demonstrations: Sequence[Example]) -> str:
    solved = [(example.prompt + _gold_answer(example)).strip() for example in demonstrations]
    return "".join(text + DEMONSTRATION_SEPARATOR for text in solved)
