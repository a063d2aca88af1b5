"""From the examples of a split to its tokenized rows, and what happens to examples that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from slzo.batches.encoded import prompt_alone
from slzo.batches.packing import PackedBatch, pack
from slzo.batches.sharing import chunk_by_tokens
from slzo.data.batch import Row
from slzo.data.chat import ChatEncoder
from slzo.data.encoding import Encoder
from slzo.data.files import format_left_out, refuse, refuse_all
from slzo.tasks.base import Example
from slzo.utils.console import say, warn
from slzo.utils.errors import RowError

# Prompts and tokens per forward pass of the profile: enough for speed, too few to raise the peak memory of a run.
_PROMPTS, _PROMPT_TOKENS = 16, 4096


@contextmanager
def catch_bad_row(bad: list[RowError], skip: bool) -> Iterator[None]:
    """Add the error of a row that cannot be used to ``bad`` if ``skip`` is set; otherwise raise it with advice."""
    try:
        yield
    except RowError as error:
        if not skip:
            refuse(error)
        bad.append(error)


def encode_rows(
    numbered: Iterable[tuple[int, Example]],
    encoder: Encoder,
    *,
    split: str,
    first_key: int,
    demonstrations: tuple[Example, ...],
    max_new_tokens: int,
    generates: bool,
    only_gold: bool,
    skip_bad_rows: bool,
) -> list[Row]:
    """Return the rows of examples.

    Args:
        numbered: The examples with their places in the split.
        encoder: Encoder of text into tokens.
        split: Name of the split, for messages.
        first_key: Key of the first example of the split; keys are unique over all splits.
        demonstrations: Solved examples before each prompt.
        max_new_tokens: Tokens that a generated answer may have.
        generates: Whether answers are generated, which needs the prompt alone.
        only_gold: Whether only the right candidates are encoded.
        skip_bad_rows: Whether examples that cannot be used are left out and reported.

    Raises:
        SlzoError: No example can be used, or one cannot and ``skip_bad_rows`` is not set.
    """
    found: list[Row] = []
    bad: list[RowError] = []
    encoder.num_shortened = 0
    for place, example in numbered:
        with catch_bad_row(bad, skip_bad_rows):
            prompt: tuple[int, ...] = ()
            if generates or not example.candidates:
                prompt = encoder.encode_prompt(example, demonstrations, max_new_tokens)
            if example.candidates:
                encoded = encoder.encode(example, first_key + place, demonstrations, only_gold)
            else:
                encoded = prompt_alone(first_key + place, prompt)
            _check_tokens(example, (prompt, *(sequence.ids for sequence in encoded.sequences)), encoder.num_embeddings)
            found.append(Row(example, encoded, place, prompt if generates else ()))
    if bad and not found:
        refuse_all(bad, f"the {split} split")
    if bad:
        say(format_left_out(bad, len(found), f"the {split} split"))
    if encoder.num_shortened:
        how = "lose earlier turns first" if isinstance(encoder, ChatEncoder) else "are cut on the left"
        warn(
            f"data.max_length {encoder.max_length}: {encoder.num_shortened} sequences of {split} rows are longer, and {how}"
        )
    return found


def _check_tokens(example: Example, sequences: Iterable[tuple[int, ...]], num_embeddings: int | None) -> None:
    """Raise RowError if a token has no embedding; a tokenizer may have tokens that its model lacks."""
    if num_embeddings is None:
        return
    largest = max(max(ids, default=0) for ids in sequences)
    if largest >= num_embeddings:
        raise RowError(
            f"{example.location}: the tokenizer gives it token {largest}, and the model has {num_embeddings}; remove the special "
            "token from the text"
        )


def prompt_batches(encoder: Encoder, examples: Sequence[Example], skip_bad_rows: bool = False) -> list[PackedBatch]:
    """Return packed prompts without answers, for the outlier profile; batches of long prompts contain fewer of them."""
    prompts = []
    for example in examples:
        with catch_bad_row([], skip_bad_rows):  # bad rows are reported when the split is encoded
            prompts.append(encoder.encode_prompt(example, max_new_tokens=1))
    chunks = chunk_by_tokens(prompts, _PROMPT_TOKENS, _PROMPTS, share=False)
    return [pack([prompt_alone(number, prompts[number]) for number in chunk]) for chunk in chunks]
