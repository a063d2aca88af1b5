"""Hidden states that enter the tuned layer, kept per example: the layers before it never change."""

from collections.abc import Sequence

import torch
from torch import Tensor


class PrefixCache:
    """Keeps hidden states by example until a memory budget is spent; the rest is recomputed each time.

    Args:
        budget_gb: CPU memory to use, in GiB; 0 keeps nothing.
    """

    def __init__(self, budget_gb: float) -> None:
        self.budget = int(budget_gb * 2**30)
        self.num_bytes = 0
        self._states: dict[int, Tensor] = {}

    def get(self, keys: Sequence[int], device: torch.device) -> Tensor | None:
        """Concatenated hidden states, shape (T, hidden), or ``None`` unless every example is known."""
        if not self.budget or any(key not in self._states for key in keys):
            return None
        return torch.cat([self._states[key] for key in keys]).to(device, non_blocking=True)

    def put(self, keys: Sequence[int], lengths: Sequence[int], hidden: Tensor) -> None:
        """Keep what fits.

        Args:
            keys: One per example.
            lengths: Packed tokens of each example.
            hidden: Shape (T, hidden).
        """
        for key, states in zip(keys, hidden.split(tuple(lengths)), strict=True):
            size = states.numel() * states.element_size()
            if key in self._states or self.num_bytes + size > self.budget:
                continue
            self._states[key] = states.detach().to("cpu", copy=True)
            self.num_bytes += size

    def clear(self) -> None:
        """Forget everything; needed when the layers before the tuned one change."""
        self._states.clear()
        self.num_bytes = 0
