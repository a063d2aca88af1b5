"""The tensors being tuned: float32 masters of some of the model's weights."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple, Self

import torch
from torch import Tensor, nn

from slzo.utils.errors import SlzoError, one_line, short_repr
from slzo.zo.noise import Noise, gaussian
from slzo.zo.tuned_tensor import KINDS, TunedTensor, Whole

Direction = Mapping[str, Tensor]
"""One float32 tensor for each tuned tensor that moves, by name."""

Gradient = Mapping[str, Tensor]
"""The gradient of each tuned tensor that has one, by name, float32."""


class Point(NamedTuple):
    """A point ``masters + scale * direction`` at which the loss is evaluated."""

    direction: Direction
    scale: float


UNPERTURBED = Point({}, 0.0)
"""The point without a perturbation."""

Subset = Callable[[int, int], Collection[str]]
"""Returns the names of the tensors that a step perturbs. Arguments: seed, step."""

# Larger directions are drawn again at each use. For all parameters of a model, holding one would take more memory than the model.
_HOLD_BYTES = 2 * 2**30
_ADVICE = "the checkpoint is of another model, layer or scope"


class _LazyDirection(Mapping[str, Tensor]):
    """A direction that is not held in memory: each access draws the tensor."""

    def __init__(self, names: Collection[str], draw: Callable[[str], Tensor]) -> None:
        self._names = names
        self._draw = draw

    def __contains__(self, name: object) -> bool:  # the default of Mapping would draw the tensor
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

    Perturbed weights are always written from the masters, never by adding and subtracting in place. So nothing drifts, and
    restoring is exact. The optimizer updates the masters and a checkpoint stores them, so small updates are not lost when the
    model itself is in bfloat16 or float16.

    This takes the memory of one float32 copy of the tuned tensors, and of one more while a direction is held.

    Args:
        tensors: The tensors by name; all elements of a plain tensor are tuned.
        subset: Chooses the tensors that a step perturbs; ``None`` for all.
        hold_bytes: Directions of more bytes are drawn again at each use instead of held.

    Raises:
        SlzoError: They are not a dictionary, or a tensor has two names.
    """

    def __init__(
        self, tensors: Mapping[str, TunedTensor | Tensor], subset: Subset | None = None, hold_bytes: int = _HOLD_BYTES
    ) -> None:
        super().__init__()
        if not isinstance(tensors, Mapping):
            raise SlzoError(
                f"model.scope: TunedTensors got a {type(tensors).__name__}; give a dictionary of tensors by name, such as "
                "dict(model.named_parameters())"
            )
        self.names = tuple(tensors)
        self.tensors = nn.ModuleList(t if isinstance(t, TunedTensor) else Whole(t) for t in tensors.values())
        self.subset = subset
        self.hold_bytes = hold_bytes
        first: dict[int, str] = {}
        for name, tensor in self.items():
            if (other := first.setdefault(id(tensor.live), name)) != name:
                raise SlzoError(f"model.scope: {other!r} and {name!r} are the same tensor; name it once")

    def items(self) -> Iterator[tuple[str, TunedTensor]]:
        """Iterate over names and tuned tensors."""
        return zip(self.names, self.tensors, strict=True)  # type: ignore[arg-type]

    @property
    def masters(self) -> list[nn.Parameter]:
        """The masters in the order of their names; the optimizer updates these."""
        return [tensor.master for _, tensor in self.items()]

    @property
    def num_elements(self) -> int:
        """Number of tuned elements."""
        return sum(master.numel() for master in self.masters)

    @property
    def may_be_copied(self) -> bool:
        """Whether a copy of the masters takes at most ``hold_bytes``."""
        return 4 * self.num_elements <= self.hold_bytes

    def named_masters(self) -> dict[str, nn.Parameter]:
        """Return the masters by name."""
        return dict(zip(self.names, self.masters, strict=True))

    def names_of_step(self, seed: int, step: int) -> Sequence[str]:
        """Return the names of the tensors that a step perturbs.

        Raises:
            SlzoError: The subset has a name that is not tuned.
        """
        if self.subset is None:
            return self.names
        names = self.subset(seed, step)
        if not isinstance(names, Collection) or not set(names) <= set(self.names):
            raise SlzoError(
                f"model.scope: the function of subset() returned {short_repr(names)} for step {step}; let it return a list of "
                "names of tuned tensors"
            )
        return tuple(names)

    def draw(self, seed: int, step: int, query: int, noise: Noise = gaussian) -> Direction:
        """Draw the direction of one query of a step, on the masters' device."""
        masters = self.named_masters()
        names = self.names_of_step(seed, step)

        def draw_tensor(name: str) -> Tensor:
            return noise(masters[name], seed, step, query, name)

        if 4 * sum(masters[name].numel() for name in names) > self.hold_bytes:
            return _LazyDirection(names, draw_tensor)
        return {name: draw_tensor(name) for name in names}

    @torch.no_grad()
    def write(self, point: Point) -> None:
        """Set the live weights to a point. Tensors that are not in its direction do not change.

        Without any, as :data:`UNPERTURBED`, all masters are restored.
        """
        direction, scale = point
        if not direction:
            self.restore()
            return
        for name, tensor in self.items():
            if name in direction:
                tensor.write(direction[name], scale)

    @contextmanager
    @torch.no_grad()
    def live_points(self, points: Sequence[Point]) -> Iterator[Callable[[int], None]]:
        """Yield a function that sets the live weights to a point, given by its index in ``points``.

        If copies of the weights for all points take at most ``hold_bytes``, they are held, and a change of point only swaps
        pointers. Otherwise each change writes the weights. Afterwards the live weights use their original memory again and are
        at one of the points.
        """
        names = {name for point in points for name in point.direction}
        live = {name: tensor.live for name, tensor in self.items() if name in names}
        num_bytes = sum(tensor.nbytes for tensor in live.values())
        if len(points) * num_bytes > self.hold_bytes:
            yield lambda number: self.write(points[number])
            return
        original = {name: tensor.data for name, tensor in live.items()}
        copies: list[dict[str, Tensor]] = []
        for point in points[:-1]:
            self.write(point)
            copies.append({name: tensor.data.clone() for name, tensor in live.items()})
        self.write(points[-1])
        copies.append(original)

        def change(number: int) -> None:
            for name, tensor in live.items():
                tensor.data = copies[number][name]

        try:
            yield change
        finally:
            change(len(points) - 1)

    @torch.no_grad()
    def restore(self, names: Collection[str] | None = None) -> None:
        """Set the live weights to the masters, for all tensors or only for the given ones."""
        for name, tensor in self.items():
            if names is None or name in names:
                tensor.write(None, 0.0)

    @torch.no_grad()
    def accumulate(
        self, gradient: dict[str, Tensor], direction: Direction, factor: float, ends: tuple[float, float]
    ) -> None:
        """Add ``factor`` times a direction to a gradient, in place. The direction may be overwritten.

        ``ends`` are the two scales at which the loss was evaluated along the direction. The direction is replaced by the one that
        the rounded live weights moved along, see :meth:`TunedTensor.applied`.
        """
        for name, tensor in self.items():
            if name in direction:
                moved = tensor.applied(direction[name], *ends)
                gradient[name] = gradient[name].add_(moved, alpha=factor) if name in gradient else moved.mul_(factor)

    def to_master_gradient(self, gradient: Gradient) -> dict[str, Tensor]:
        """Return the gradients of masters by name, float32, from those of their live tensors."""
        return {name: tensor.to_master_gradient(gradient[name]) for name, tensor in self.items() if name in gradient}

    def with_zeros(self, gradient: Gradient) -> dict[str, Tensor]:
        """Return the gradient of all masters, in the order of their names; it is 0 for those without one."""
        masters = self.named_masters()
        return {name: gradient[name] if name in gradient else torch.zeros_like(masters[name]) for name in masters}

    def set_grad(self, gradient: Gradient) -> None:
        """Set ``grad`` of all masters; it is ``None`` for masters without a gradient."""
        for name, master in self.named_masters().items():
            own = gradient.get(name)
            # torch's fused optimizers read any other layout in the wrong order on a CPU
            master.grad = None if own is None else own.contiguous()

    def clone_masters(self) -> dict[str, Tensor]:
        """Return copies of the masters by name, for :meth:`load`."""
        return {name: master.detach().clone() for name, master in self.named_masters().items()}

    @torch.no_grad()
    def load(self, masters: Mapping[str, Tensor]) -> None:
        """Set all masters, by name, and the live weights.

        Raises:
            SlzoError: A tensor is unknown, missing or of another shape. Nothing has changed then.
        """
        own = self.named_masters()
        wrong = [name for name, given in masters.items() if name not in own or own[name].shape != given.shape]
        for name in [*wrong, *(name for name in own if name not in masters)]:
            raise SlzoError(f"ckpt_path: tensor {name!r} does not fit the tuned tensors; {_ADVICE}")
        for name, master in own.items():
            master.copy_(masters[name])
        self.restore()

    def description(self) -> dict[str, dict[str, Any]]:
        """Describe how each tensor is tuned, for checkpoints: tensors, strings and numbers only, without the masters' values."""
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
        """Create the tuned tensors of a :meth:`description` from an untuned model. Set their values with :meth:`load`.

        Raises:
            SlzoError: The model has no such tensor, or one of another shape, or the tensor cannot be tuned like this.
        """
        tensors = {}
        for name, entry in description.items():
            if name not in parameters:
                raise SlzoError(f"ckpt_path: the model has no tensor {name!r}; {_ADVICE}")
            constants = dict(entry)
            try:
                kind, shape = constants.pop("kind"), list(constants.pop("shape"))
                if list(parameters[name].shape) != shape:
                    raise ValueError(
                        f"its shape is {list(parameters[name].shape)} in the model, and {shape} in the checkpoint"
                    )
                tensors[name] = KINDS[kind](parameters[name], **constants)
            except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
                raise SlzoError(
                    f"ckpt_path: tensor {name!r} does not fit the model ({one_line(error)}); {_ADVICE}"
                ) from error
        return cls(tensors, subset)
