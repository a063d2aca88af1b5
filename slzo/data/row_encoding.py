"""Tokenizes the examples of a split, and reports those that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from slzo.batches.chunks import chunk_by_tokens
from slzo.batches.encoded import EncodedPrompt, EncodedSequence, prompt_alone
from slzo.batches.packing import PackedBatch, pack
from slzo.data.batch import Row
from slzo.data.encoding import Encoder
from slzo.data.files import BadRows
from slzo.tasks.base import Example
from slzo.utils.console import rank_zero_print, rank_zero_warn
from slzo.utils.errors import RowError
from slzo.utils.pluralize import pluralize

# Prompts and tokens per forward pass of the profile: enough for speed, too few to raise the peak memory of a run.
_PROMPTS, _PROMPT_TOKENS = 16, 4096


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
    """Return the rows of examples, which are given with their places in the split.

    The key of an example is ``first_key`` plus its place; keys are unique over all splits. Demonstrations are solved examples
    before each prompt. If answers of at most ``max_new_tokens`` are generated, the prompt is encoded alone too. With
    ``only_gold``, only right candidates are encoded, and with ``skip_bad_rows`` unusable examples are left out and reported.

    Raises:
        SlzoError: No example can be used, or one cannot and ``skip_bad_rows`` is not set.
    """
    found: list[Row] = []
    bad = BadRows(skip_bad_rows)
    num_cut = num_long = 0
    for place, example in numbered:
        try:
            prompt = EncodedPrompt((), cut=False)
            if generates or not example.candidates:
                prompt = encoder.encode_prompt(example, demonstrations, max_new_tokens if generates else 1)
            if example.candidates:
                encoded = encoder.encode(example, first_key + place, demonstrations, only_gold)
            else:
                encoded = prompt_alone(first_key + place, prompt.ids)
            _check_tokens(
                example, (prompt.ids, *(sequence.ids for sequence in encoded.sequences)), encoder.num_embeddings
            )
            found.append(Row(example, encoded, place, prompt.ids if generates else ()))
            num_cut += prompt.cut or encoded.cut
            num_long += generates and _answer_length(encoded.sequences[0]) > max_new_tokens
        except RowError as error:
            bad.add(error)
    if note := bad.report(len(found), f"the {split} split"):
        rank_zero_print(note)
    if num_cut:
        rank_zero_warn(
            f"data.max_length {encoder.max_length}: shortened {num_cut} of {pluralize(len(found), f'{split} row')}, "
            f"{encoder.shortening}; {encoder.length_advice}, or move what must stay to the end of the prompt"
        )
    if num_long:
        rank_zero_warn(
            f"data.task.max_new_tokens {max_new_tokens}: the answers of {pluralize(num_long, f'{split} row')} are longer, so "
            "generated answers are cut before they can equal them; raise it"
        )
    return found


def _answer_length(sequence: EncodedSequence) -> int:
    """Return the number of tokens of the answer at the end of a sequence, without the one that ends it."""
    counts = sequence.counts or (True,) * sequence.num_answer
    return next((number for number, counted in enumerate(reversed(counts)) if not counted), len(counts)) - 1


def _check_tokens(example: Example, sequences: Iterable[tuple[int, ...]], num_embeddings: int | None) -> None:
    """Raise RowError if a token has no embedding; a tokenizer may have tokens that its model lacks."""
    if num_embeddings is None:
        return
    largest = max(max(ids, default=0) for ids in sequences)
    if largest >= num_embeddings:
        raise RowError(
            f"{example.location}: the tokenizer gives it token {largest}, and the model has {num_embeddings}; give the tokenizer "
            "that belongs to the model, or remove special tokens from the text"
        )


def prompt_batches(encoder: Encoder, examples: Sequence[Example], skip_bad_rows: bool = False) -> list[PackedBatch]:
    """Return packed prompts without answers, for the outlier profile; batches of long prompts contain fewer of them."""
    prompts = []
    bad = BadRows(skip_bad_rows)  # they are reported when the split is encoded
    for example in examples:
        try:
            prompts.append(encoder.encode_prompt(example, max_new_tokens=1).ids)
        except RowError as error:
            bad.add(error)
    chunks = chunk_by_tokens([*map(len, prompts)], _PROMPT_TOKENS, _PROMPTS)
    return [pack([prompt_alone(number, prompts[number]) for number in chunk]) for chunk in chunks]
