"""The tensors being tuned: float32 masters beside the live weights of the model."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Self

import torch
from torch import Tensor, nn

from slzo.zo.noise import Noise, gaussian
from slzo.zo.tensors import KINDS, TunedTensor, Whole

Direction = Mapping[str, Tensor]
"""One float32 tensor per tuned tensor that moves, by name."""

Subset = Callable[[int, int], Collection[str]]
"""Names of the tensors that are perturbed in a step: seed, step."""

# Directions of more bytes are drawn anew each time they are needed: for a whole model, holding them would cost more than
# the model itself.
_HOLD_BYTES = 2 * 2**30


class _DrawnAgain(Mapping[str, Tensor]):
    """A direction that is never held as a whole: each access draws."""

    def __init__(self, names: Collection[str], draw: Callable[[str], Tensor]) -> None:
        self._names = names
        self._draw = draw

    def __contains__(self, name: object) -> bool:  # Mapping's own would draw
        return name in self._names

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._names:
            raise KeyError(name)
        return self._draw(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


class TunedTensors(nn.Module):
    """Float32 masters of some of a model's tensors.

    Perturbed weights are always written from the masters, never by adding and subtracting in place: nothing drifts, and
    restoring is exact. The masters are what the optimizer updates and a checkpoint stores, so that small updates are not
    lost when the model itself is in bfloat16 or float16.

    Args:
        tensors: By name; a plain tensor is tuned as a whole.
        subset: Which of them are perturbed in a step; ``None`` for all.
        hold_bytes: Directions above this size are drawn anew each time instead of held.

    Extra memory: one float32 copy of what is tuned, and one more while a direction is held.
    """

    def __init__(
        self, tensors: Mapping[str, TunedTensor | Tensor], subset: Subset | None = None, hold_bytes: int = _HOLD_BYTES
    ) -> None:
        super().__init__()
        self.names = tuple(tensors)
        self.tensors = nn.ModuleList(t if isinstance(t, TunedTensor) else Whole(t) for t in tensors.values())
        self.subset = subset
        self.hold_bytes = hold_bytes

    def items(self) -> Iterator[tuple[str, TunedTensor]]:
        """Tuned tensors by name."""
        return zip(self.names, self.tensors, strict=True)  # type: ignore[arg-type]

    @property
    def masters(self) -> list[nn.Parameter]:
        """What the optimizer updates, in the order of the names."""
        return [tensor.master for _, tensor in self.items()]

    @property
    def num_elements(self) -> int:
        """Number of tuned scalars."""
        return sum(master.numel() for master in self.masters)

    def named_masters(self) -> dict[str, nn.Parameter]:
        """Masters by name."""
        return dict(zip(self.names, self.masters, strict=True))

    def names_of_step(self, seed: int, step: int) -> Sequence[str]:
        """The tensors that move in a step of a run with this seed."""
        return self.names if self.subset is None else tuple(self.subset(seed, step))

    def draw(self, seed: int, step: int, query: int, noise: Noise = gaussian) -> Direction:
        """The direction of one query of a step, on the masters' device."""
        masters = self.named_masters()
        names = self.names_of_step(seed, step)

        def one(name: str) -> Tensor:
            return noise(masters[name], seed, step, query, name)

        if 4 * sum(masters[name].numel() for name in names) > self.hold_bytes:
            return _DrawnAgain(names, one)
        return {name: one(name) for name in names}

    @torch.no_grad()
    def write(self, direction: Direction, scale: float) -> None:
        """Set the live weights to ``master + scale * direction``; tensors that are not part of it stay as they are."""
        for name, tensor in self.items():
            if name in direction:
                tensor.write(direction[name], scale)

    @torch.no_grad()
    def restore(self, names: Collection[str] | None = None) -> None:
        """Set the live weights to the masters; of some tensors alone, where the others are there already."""
        for name, tensor in self.items():
            if names is None or name in names:
                tensor.write(None, 0.0)

    @torch.no_grad()
    def accumulate(
        self, gradient: dict[str, Tensor], direction: Direction, factor: float, ends: tuple[float, float] | None = None
    ) -> None:
        """Add ``factor * direction`` to a gradient, in place; the direction may be consumed.

        With ``ends``, the two scales at which the loss was taken along it, what rounding left of the direction is used.
        """
        for name, tensor in self.items():
            if name in direction:
                moved = direction[name] if ends is None else tensor.applied(direction[name], *ends)
                gradient[name] = gradient[name].add_(moved, alpha=factor) if name in gradient else moved.mul_(factor)

    def set_grad(self, gradient: Mapping[str, Tensor]) -> None:
        """Give the masters their gradients; those without one get none."""
        for name, master in self.named_masters().items():
            master.grad = gradient.get(name)

    def copy_of_masters(self) -> dict[str, Tensor]:
        """What :meth:`load` takes."""
        return {name: master.detach().clone() for name, master in self.named_masters().items()}

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor]) -> None:
        """Set all masters, given by name, and the live weights; KeyError if one is missing or of another shape."""
        own = self.named_masters()
        for name, master in own.items():
            if masters[name].shape != master.shape:
                raise KeyError(f"{name} of shape {list(masters[name].shape)}")
        for name, master in own.items():
            master.copy_(masters[name])
        self.restore()

    def misfit(self, masters: Mapping[str, Tensor]) -> str | None:
        """Name of the first tensor that :meth:`load` would not take, or miss; ``None`` if there is none."""
        own = self.named_masters()
        wrong = [name for name, given in masters.items() if name not in own or own[name].shape != given.shape]
        return next(iter([*wrong, *(name for name in own if name not in masters)]), None)

    def description(self) -> dict[str, dict[str, Any]]:
        """How each tensor is tuned, besides the values of its master: tensors, strings and numbers only, for checkpoints."""
        return {
            name: {"kind": tensor.kind, "shape": list(tensor.live.shape), **tensor.constants()}
            for name, tensor in self.items()
        }

    @classmethod
    def from_description(
        cls,
        parameters: Mapping[str, Tensor],
        description: Mapping[str, Mapping[str, Any]],
        subset: Subset | None = None,
    ) -> Self:
        """Tuned tensors as :meth:`description` says, of an untuned model's parameters; :meth:`load` then sets their values.

        Raises:
            KeyError: The model has no such tensor, or one of another shape, or it cannot be tuned like this.
        """
        tensors = {}
        for name, entry in description.items():
            constants = dict(entry)
            kind, shape = constants.pop("kind"), list(constants.pop("shape"))
            if list(parameters[name].shape) != shape:
                raise KeyError(f"{name} of shape {shape}")
            try:
                tensors[name] = KINDS[kind](parameters[name], **constants)
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                raise KeyError(f"{name} as {kind} ({' '.join(str(error).split())})") from error
        return cls(tensors, subset)
