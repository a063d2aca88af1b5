"""The tensors being tuned: float32 masters beside the live weights of the model."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slzo.zo.noise import gaussian

Direction = dict[str, Tensor]
"""One float32 tensor per tuned tensor, by name."""


class TunedTensors(nn.Module):
    """Float32 masters of some of a model's tensors.

    Perturbed weights are always written from the masters, never by adding and subtracting in place: nothing drifts, and
    restoring is exact. The masters are what the optimizer updates and a checkpoint stores, so that small updates are not
    lost when the model itself is in bfloat16 or float16.

    Args:
        live: The model's tensors by name; they are overwritten in place.

    Extra memory: one float32 copy of the tensors, and one more while a direction is held.
    """

    def __init__(self, live: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.live = dict(live)
        self.names = tuple(self.live)
        self.masters = nn.ParameterList(
            # requires_grad is what optimizers and Lightning expect of a trained tensor; no graph is ever built
            nn.Parameter(tensor.detach().to(torch.float32, copy=True))
            for tensor in self.live.values()
        )

    @property
    def num_elements(self) -> int:
        """Number of tuned scalars."""
        return sum(master.numel() for master in self.masters)

    def named_masters(self) -> dict[str, nn.Parameter]:
        """Masters by the model's tensor names."""
        return dict(zip(self.names, self.masters, strict=True))

    def draw(self, seed: int, step: int, query: int) -> Direction:
        """The direction z ~ N(0, I) of one query, on the masters' device."""
        return {name: gaussian(master, seed, step, query, name) for name, master in self.named_masters().items()}

    @torch.no_grad()
    def write(self, direction: Direction | None = None, scale: float = 0.0) -> None:
        """Set the live weights to ``master + scale * direction``, rounded once to the model's dtype."""
        for name, master in self.named_masters().items():
            live = self.live[name]
            if direction is None:
                live.copy_(master)
            elif live.dtype == torch.float32:
                torch.add(master, direction[name], alpha=scale, out=live)
            else:
                live.copy_(torch.add(master, direction[name], alpha=scale))

    def restore(self) -> None:
        """Set the live weights to the masters."""
        self.write()

    @torch.no_grad()
    def applied(self, direction: Direction, scale: float) -> Direction:
        """The direction that rounding leaves of ``direction``.

        Args:
            direction: What was asked for; its tensors are replaced.
            scale: The step ``eps`` along it.

        Returns:
            ``(round(w + eps z) - round(w - eps z)) / (2 eps)``. In float32 the difference is far below the noise of the
            estimate, and ``direction`` itself is returned.
        """
        if all(live.dtype == torch.float32 for live in self.live.values()):
            return direction
        for name, master in self.named_masters().items():
            dtype = self.live[name].dtype
            plus = torch.add(master, direction[name], alpha=scale).to(dtype).float()
            minus = torch.add(master, direction[name], alpha=-scale).to(dtype).float()
            direction[name] = (plus - minus) / (2 * scale)  # in place of the old one: no second direction is held
        return direction

    @torch.no_grad()
    def accumulate_grad(self, direction: Direction, factor: float) -> None:
        """Add ``factor * direction`` to the masters' gradients; ``direction`` may be consumed."""
        for name, master in self.named_masters().items():
            if master.grad is None:
                master.grad = direction[name].mul_(factor)
            else:
                master.grad.add_(direction[name], alpha=factor)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop the gradients."""
        for master in self.masters:
            master.grad = None

    @torch.no_grad()
    def load(self, tensors: Mapping[str, Tensor]) -> None:
        """Set masters and live weights.

        Args:
            tensors: Every tuned tensor by name.

        Raises:
            KeyError: A tensor is missing.
        """
        for name, master in self.named_masters().items():
            master.copy_(tensors[name])
        self.restore()
