"""Keys and values that later layers take from an earlier one, as in Gemma 4 E2B.

Parts of such a model exchange them with the hidden states, as further columns: caches and copies for several points then
hold both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn

ARGUMENT = "shared_kv_states"
"""The decoder takes a mapping of keys and values by kind of layer under this name; its layers write to it and read it."""


class SharedKeyValues(NamedTuple):
    """Keys and values that later layers read.

    Attributes:
        kind: Kind of layer, which they are stored by.
        source: The layer that computes them.
        heads: Number of their heads.
        sizes: Size of a key and of a value.
    """

    kind: str
    source: int
    heads: int
    sizes: tuple[int, int]

    @property
    def columns(self) -> int:
        """Number of values per token."""
        return self.heads * sum(self.sizes)


@dataclass(frozen=True)
class KeyValueSharing:
    """What the layers of a model share.

    Attributes:
        mapping: Makes the mapping that the decoder takes, from a dictionary.
        shared: Keys and values that later layers read, in the order in which they are computed.
    """

    mapping: Callable[[dict[str, Any]], MutableMapping[str, Any]] = dict
    shared: tuple[SharedKeyValues, ...] = ()

    @classmethod
    def of(cls, decoder: nn.Module, layers: nn.ModuleList, ids: Tensor) -> KeyValueSharing:
        """Find out what the layers share, from forward passes of token ids, shape (1, tokens)."""
        passed: list[object] = []
        sources: dict[str, int] = {}

        def see_argument(_: nn.Module, __: Any, options: dict[str, Any]) -> None:
            passed.append(options.get(ARGUMENT))

        with layers[0].register_forward_pre_hook(see_argument, with_kwargs=True):
            decoder(input_ids=ids, use_cache=False)
        if not isinstance(passed[0], MutableMapping):
            return cls()
        mapping = cast("Callable[[dict[str, Any]], MutableMapping[str, Any]]", type(passed[0]))
        states = mapping({})

        def see_sources(layer: nn.Module, *_: Any) -> None:
            sources.update({kind: list(layers).index(layer) for kind in states if kind not in sources})

        with ExitStack() as hooks:
            for layer in layers:
                hooks.enter_context(layer.register_forward_hook(see_sources))
            decoder(input_ids=ids, use_cache=False, **{ARGUMENT: states})
        shared = (
            SharedKeyValues(
                kind, source, states[kind][0].shape[1], (states[kind][0].shape[3], states[kind][1].shape[3])
            )
            for kind, source in sources.items()
        )
        return cls(mapping, tuple(shared))

    def below(self, layer: int, num_layers: int) -> tuple[SharedKeyValues, ...]:
        """Return the keys and values that the states before a layer carry; after the last layer there are none."""
        return tuple(each for each in self.shared if each.source < layer < num_layers)


def by_head(states: Tensor, heads: int) -> Tensor:
    """Split columns of all heads, shape (..., T, heads * size), into shape (..., heads, T, size)."""
    return states.unflatten(-1, (heads, -1)).transpose(-3, -2)


def split_states(states: Tensor, shared: Sequence[SharedKeyValues]) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Split states, shape (B, T, hidden + columns), into hidden states and keys and values, shapes (B, heads, T, size)."""
    if not shared:
        return states, {}
    end = states.shape[-1] - sum(each.columns for each in shared)
    hidden, found = states[..., :end], {}
    for each in shared:
        sizes = [each.heads * size for size in each.sizes]
        key, value = states[..., end : end + sum(sizes)].split(sizes, dim=-1)
        found[each.kind] = (by_head(key, each.heads), by_head(value, each.heads))
        end += sum(sizes)
    return hidden, found


def join_states(
    hidden: Tensor, found: Mapping[str, tuple[Tensor, Tensor]], shared: Sequence[SharedKeyValues]
) -> Tensor:
    """Invert :func:`split_states`."""
    if not shared:
        return hidden
    pieces = (state.transpose(1, 2).flatten(2) for each in shared for state in found[each.kind])
    return torch.cat([hidden, *(piece.to(hidden) for piece in pieces)], dim=-1)
