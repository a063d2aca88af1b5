"""Run layers with another attention in place of their own, and record their keys and values."""

from contextlib import suppress
from typing import Any, NoReturn

from torch import Tensor, nn

from slzo.batches.packing import TokenBatch
from slzo.models.attention import KeyValues, packed_attention_forward
from slzo.models.parts import ModelParts


def can_run_last_tokens(parts: ModelParts) -> bool:
    """Return whether layers of a model can run for some tokens, with the recorded keys and values of the others."""
    return parts.packed and parts.virtual_tokens is None and not parts.placement.elsewhere


def run_with_key_values(
    parts: ModelParts, batch: TokenBatch, start: int, stop: int, hidden: Tensor | None
) -> tuple[Tensor, KeyValues]:
    """Run layers, see :meth:`ModelParts.run`; return the states after them, and their keys and values."""
    states: dict[nn.Module, tuple[Tensor, Tensor]] = {}

    def attend(
        layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]
    ) -> tuple[Tensor, None]:
        states[layer] = (key[0], value[0])
        return packed_attention_forward(layer, query, key, value, None, packed_layout=batch.layout, **options)

    return parts.run(batch, start, stop, hidden, attend=attend), states


class _StopForward(Exception):  # noqa: N818 - no error
    """Ends the forward pass of a layer as soon as its keys and values are known."""


def compute_key_values(parts: ModelParts, batch: TokenBatch, start: int, stop: int, hidden: Tensor) -> KeyValues:
    """Return the keys and values of layers, see :meth:`ModelParts.run`. For the last layer, only keys and values are computed."""
    if start == stop:
        return {}
    states: dict[nn.Module, tuple[Tensor, Tensor]] = {}
    if start < stop - 1:
        hidden, below = run_with_key_values(parts, batch, start, stop - 1, hidden)
        states.update(below)

    def attend(layer: nn.Module, query: Tensor, key: Tensor, value: Tensor, options: dict[str, Any]) -> NoReturn:
        states[layer] = (key[0], value[0])
        raise _StopForward

    with suppress(_StopForward):
        parts.run(batch, stop - 1, stop, hidden, attend=attend)
    return states
