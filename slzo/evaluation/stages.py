"""Ranges of layers that run one more token of many answers, with the keys and values of all earlier tokens.

Keys and values are stored in buffers of rows of similar length, so that attention covers little padding.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slzo.batches.layout import NO_SEQUENCES
from slzo.batches.packing import TokenBatch
from slzo.evaluation.key_values import KeyValueBuffer, StepAttention
from slzo.models.attention import KeyValues
from slzo.models.key_value_capture import run_with_key_values
from slzo.models.parts import ModelParts


class LayerStage:
    """A range of layers, with the keys and values of the rows that run through them.

    Args:
        parts: The model.
        start: First layer.
        stop: One past the last layer.
        lengths: Number of tokens of each row's prompt, by row.
        num_new: Most tokens that follow a prompt.
    """

    def __init__(self, parts: ModelParts, start: int, stop: int, lengths: Mapping[int, int], num_new: int) -> None:
        self.parts, self.start, self.stop = parts, start, stop
        self.buffers = KeyValueBuffer.of(lengths, num_new, parts.model.device)

    @property
    def rows(self) -> list[int]:
        """The rows, in the order in which they run."""
        return [row for buffer in self.buffers for row in buffer.rows]

    def prefill(self, batch: TokenBatch, hidden: Tensor | None, positions: Mapping[int, Tensor]) -> Tensor:
        """Run packed prompts, store the keys and values of each row's prompt, and return the states after the last layer."""
        output, states = run_with_key_values(self.parts, batch, self.start, self.stop, hidden)
        self.fill(states, positions)
        return output

    def fill(self, states: KeyValues, positions: Mapping[int, Tensor]) -> None:
        """Store each row's keys and values, which are at the given packed positions of ``states``."""
        for buffer in self.buffers:
            buffer.fill(states, positions)

    def remove(self, finished: set[int]) -> None:
        """Remove rows."""
        for buffer in self.buffers:
            buffer.remove(finished)
        self.buffers = [buffer for buffer in self.buffers if buffer.rows]

    def fork(self, row: int, new: int) -> None:
        """Add the row ``new`` as a copy of ``row``."""
        next(buffer for buffer in self.buffers if row in buffer.rows).fork(row, new)

    def advance(self, newest: Mapping[int, int], hidden: Tensor | None) -> Tensor:
        """Run one more token of each row; return its states, shape (rows, hidden), in the order of the rows."""
        new = StepAttention(self.buffers)
        ids = torch.tensor([newest[row] for row in self.rows], device=new.positions.device)
        tokens = TokenBatch(ids, new.positions, NO_SEQUENCES)
        output = self.parts.run(tokens, self.start, self.stop, hidden, attend=new.attend)
        for buffer in self.buffers:
            buffer.lengths += 1
        return output


class AnswerBranches:
    """Histories of answers; a prompt's first history has the number of the prompt, see :mod:`slzo.evaluation.decoder`.

    Args:
        stage: The layers below the varied ones, whose rows are the histories.
        prompt_of: Number of each answer's prompt.
    """

    def __init__(self, stage: LayerStage, prompt_of: Sequence[int]) -> None:
        self.stage = stage
        self._history_of = dict(enumerate(prompt_of))
        self._next = max(prompt_of) + 1

    def advance(self, tokens: Mapping[int, int], order: Sequence[int]) -> Tensor:
        """Run one more token of each answer; return the states of the answers in ``order``, shape (answers, hidden)."""
        newest: dict[int, int] = {}  # by history
        continued: dict[tuple[int, int], int] = {}  # by the history so far and its next token
        for answer, token in tokens.items():
            history = self._history_of[answer]
            if (history, token) not in continued:
                new = history
                if history in newest:
                    new, self._next = self._next, self._next + 1
                    self.stage.fork(history, new)
                continued[history, token] = new
                newest[new] = token
            self._history_of[answer] = continued[history, token]
        self.stage.remove(set(self.stage.rows) - newest.keys())
        hidden = self.stage.advance(newest, None)
        return pick_rows(hidden, self.stage.rows, [self._history_of[answer] for answer in order])


def pick_rows(hidden: Tensor, rows: Sequence[int], order: Sequence[int]) -> Tensor:
    """Reorder the states of ``rows``; a row may occur in ``order`` several times."""
    if list(order) == list(rows):
        return hidden
    place = {row: number for number, row in enumerate(rows)}
    return hidden.index_select(0, torch.tensor([place[row] for row in order], device=hidden.device))
