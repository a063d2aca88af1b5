"""From the examples of a split to its tokenized rows, and what happens to examples that cannot be used."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from slzo.batches.encoded import prompt_alone
from slzo.data.batch import Row
from slzo.data.chat import ChatEncoder
from slzo.data.encoding import Encoder
from slzo.data.files import format_left_out, refuse, refuse_all
from slzo.tasks.base import Example
from slzo.utils.console import say, warn
from slzo.utils.errors import RowError


@contextmanager
def catch_bad_row(bad: list[RowError], skip: bool) -> Iterator[None]:
    """Add the error of a row that cannot be used to ``bad`` if ``skip`` is set; otherwise raise it with advice."""
    try:
        yield
    except RowError as error:
        if not skip:
            refuse(error)
        bad.append(error)


@dataclass(frozen=True)
class RowEncoding:
    """How the examples of a split become rows.

    Attributes:
        split: Name of the split, for messages.
        encoder: Encoder of text into tokens.
        first_key: Key of the first example of the split; keys are unique over all splits.
        demonstrations: Solved examples before each prompt.
        max_new_tokens: Tokens that a generated answer may have.
        generates: Whether answers are generated, which needs the prompt alone.
        only_gold: Whether only the right candidates are encoded.
        skip_bad_rows: Whether examples that cannot be used are left out and reported.
    """

    split: str
    encoder: Encoder
    first_key: int
    demonstrations: tuple[Example, ...]
    max_new_tokens: int
    generates: bool
    only_gold: bool
    skip_bad_rows: bool

    def rows(self, numbered: Iterable[tuple[int, Example]]) -> list[Row]:
        """Return the rows of examples, which come with their places in the split.

        Raises:
            SlzoError: No example can be used, or one cannot and ``skip_bad_rows`` is not set.
        """
        found: list[Row] = []
        bad: list[RowError] = []
        self.encoder.shortened = 0
        for place, example in numbered:
            with catch_bad_row(bad, self.skip_bad_rows):
                found.append(self._row(place, example))
        if bad and not found:
            refuse_all(bad, f"the {self.split} split")
        if bad:
            say(format_left_out(bad, len(found), f"the {self.split} split"))
        self._warn_of_shortened()
        return found

    def _row(self, place: int, example: Example) -> Row:
        key = self.first_key + place
        prompt: tuple[int, ...] = ()
        if self.generates or not example.candidates:
            prompt = self.encoder.encode_prompt(example, self.demonstrations, self.max_new_tokens)
        if example.candidates:
            encoded = self.encoder.encode(example, key, self.demonstrations, self.only_gold)
        else:
            encoded = prompt_alone(key, prompt)
        return Row(example, encoded, place, prompt if self.generates else ())

    def _warn_of_shortened(self) -> None:
        encoder = self.encoder
        if encoder.shortened:
            how = "lose earlier turns first" if isinstance(encoder, ChatEncoder) else "are cut on the left"
            warn(
                f"data.max_length {encoder.max_length}: {encoder.shortened} sequences of {self.split} rows are longer, and {how}"
            )
