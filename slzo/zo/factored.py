"""Gradients of linear maps' weights as factors, which are smaller than the weights if a map has few inputs.

Let a linear map with the weight W, shape (out, in), be applied to n inputs X, shape (n, in), and let G, shape (n, out), be the
gradient with respect to its outputs. Then W has the gradient :math:`G^T X`. Processes that exchange G and X send n (in + out)
elements instead of in * out (sufficient factors; Xie et al. 2015, arXiv 1511.08486).
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import linear
from torch.overrides import TorchFunctionMode

from slzo.zo.derivatives import vjp
from slzo.zo.processes import gather_tensors, gathered_alone, sum_tensors
from slzo.zo.tuned import Gradient, TunedTensors
from slzo.zo.tuned_tensor import TunedTensor

# Factors are exchanged if those of all processes have at most this share of the gradient's elements. Every process multiplies the
# factors of all, so with many inputs this takes longer than sending the gradient.
_LARGEST_SHARE = 0.25
_SMALL_BYTES = 1 << 20


class Factors(NamedTuple):
    """The gradient of a linear map's weight.

    Attributes:
        outputs: Gradient with respect to the outputs, shape (n, out).
        inputs: Inputs, shape (n, in), dtype as ``outputs``.
    """

    outputs: Tensor
    inputs: Tensor

    def product(self) -> Tensor:
        """Return the gradient, shape (out, in)."""
        return self.outputs.T @ self.inputs


@dataclass
class FactoredGradient:
    """The gradient of the masters, partly in factors. It is the sum of both parts.

    Attributes:
        tuned: The masters.
        whole: Gradients of masters by name, float32.
        factors: Factors of the gradients of the model's own tensors by name, one for each use of a weight.
    """

    tuned: TunedTensors
    whole: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, list[Factors]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._tensors = dict(self.tuned.items())

    def add(self, more: "FactoredGradient") -> None:
        """Add another gradient, in place. Factors that become too large are multiplied."""
        for name, own in more.whole.items():
            self._add_whole(name, own)
        for name, parts in more.factors.items():
            self.factors.setdefault(name, []).extend(parts)
            if self._num_inputs(name) > _most_inputs(self._tensors[name]):
                self._multiply(name)

    def total(
        self, sums: Tensor, sum_rows: Callable[[Tensor], Tensor], gather_rows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Gradient]:
        """Return ``sums`` and the gradient of all masters, added up over the processes.

        All processes multiply the same factors. So those with the same kind of processor get the same bits.

        Args:
            sums: Numbers of this process, shape (N,), float32.
            sum_rows: Returns the sum of a tensor over the processes.
            gather_rows: Returns the tensors of all processes, stacked; ``gathered_alone`` for a single process.
        """
        num_inputs: dict[str, tuple[int, ...]] = {}
        if gather_rows is not gathered_alone:
            sums, num_inputs = self._exchange_sizes(sums, gather_rows)
        for name in [name for name in self.factors if name not in num_inputs]:
            self._multiply(name)
        names = [name for name in self.tuned.names if name in self.whole]
        if num_inputs:
            processes = len(next(iter(num_inputs.values())))
            along = [name for name in names if _is_sent_along(self.whole[name], processes)]
            self._gather(along, num_inputs, gather_rows)
            names = [name for name in names if name not in along]
        self.whole |= zip(names, sum_tensors(sum_rows, [self.whole[name] for name in names]), strict=True)
        return sums, self.tuned.with_zeros(self.whole)

    def _exchange_sizes(
        self, sums: Tensor, gather_rows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, dict[str, tuple[int, ...]]]:
        """Return ``sums``, added up, and how many inputs each process has for each weight whose factors are to be sent.

        Afterwards the gradients of other weights are whole, and have the same names on all processes.
        """
        own = [(self._num_inputs(name), name in self.whole) for name in self.tuned.names]
        gathered = gather_rows(torch.cat([sums, torch.tensor(own).to(sums).flatten()]))
        by_name = gathered[:, len(sums) :].unflatten(1, (-1, 2)).transpose(0, 1).int().tolist()
        num_inputs: dict[str, tuple[int, ...]] = {}
        for (name, tensor), of_processes in zip(self._tensors.items(), by_name, strict=True):
            numbers, is_whole = zip(*of_processes, strict=True)
            if any(is_whole) or sum(numbers) > _most_inputs(tensor):
                self._multiply(name)
                self.whole.setdefault(name, torch.zeros_like(tensor.master))
            elif any(numbers):
                num_inputs[name] = numbers
        return gathered[:, : len(sums)].sum(dim=0), num_inputs

    def _gather(
        self,
        names: Sequence[str],
        num_inputs: Mapping[str, tuple[int, ...]],
        gather_rows: Callable[[Tensor], Tensor],
    ) -> None:
        """Replace whole gradients of these names, and factors, by the gradients over all processes."""
        numbers = list(num_inputs.values())
        own = [*(self.whole[name] for name in names), *map(self._joined, num_inputs)]
        lengths = zip(*([len(self.whole[name])] * len(numbers[0]) for name in names), *numbers, strict=True)
        received = gather_tensors(gather_rows, own, list(lengths))
        for name, parts in zip(names, received, strict=False):
            self.whole[name] = torch.stack(parts).sum(dim=0)
        for name, parts in zip(num_inputs, received[len(names) :], strict=True):
            tensor = self._tensors[name]
            outputs, inputs = torch.cat(parts).tensor_split([tensor.live.shape[0]], dim=1)
            self.whole[name] = tensor.to_master_gradient(Factors(outputs, inputs).product())

    def _num_inputs(self, name: str) -> int:
        return sum(len(each.inputs) for each in self.factors.get(name, ()))

    def _joined(self, name: str) -> Tensor:
        """Remove and return the factors of a tensor, shape (n, out + in)."""
        live = self._tensors[name].live
        parts = [torch.cat(each, dim=1) for each in self.factors.pop(name, [])]
        return torch.cat(parts) if parts else live.new_zeros(0, sum(live.shape))

    def _multiply(self, name: str) -> None:
        """Multiply the factors of a tensor."""
        for each in self.factors.pop(name, []):
            self._add_whole(name, self._tensors[name].to_master_gradient(each.product()))

    def _add_whole(self, name: str, own: Tensor) -> None:
        self.whole[name] = self.whole[name].add_(own) if name in self.whole else own


def _most_inputs(tensor: TunedTensor) -> int:
    """Return the largest number of inputs of which factors are kept or sent."""
    return int(_LARGEST_SHARE * tensor.master.numel() / max(1, sum(tensor.live.shape)))


def _is_sent_along(whole: Tensor, processes: int) -> bool:
    """Return whether a whole gradient is gathered with the factors, which saves the wait for another exchange."""
    # two processes send no more to gather than to sum, but need memory for both parts
    return whole.dim() == 1 or (processes == 2 and whole.nbytes <= _SMALL_BYTES)


def factored_vjp(
    tuned: TunedTensors, function: Callable[[], Tensor]
) -> tuple[Tensor, Callable[[Tensor], FactoredGradient]]:
    """Like :func:`slzo.zo.derivatives.vjp`, but the gradients of linear maps' weights are returned as factors.

    If ``function`` applies such a weight to many inputs, or also uses it in another way, the gradient of that use is whole.
    """
    kept = _KeptFactors(tuned)

    def keeping() -> Tensor:
        with kept:
            return function()

    output, vjp_fn = vjp(tuned, keeping)
    return output, lambda gradient: FactoredGradient(tuned, vjp_fn(gradient), kept.factors)


class _KeptFactors(TorchFunctionMode):
    """Keeps the factors of tuned weights' gradients in the backward pass.

    Args:
        tuned: The masters.

    Attributes:
        factors: Factors by name.
    """

    def __init__(self, tuned: TunedTensors) -> None:
        super().__init__()
        self._names = {id(tensor.live): name for name, tensor in tuned.items()}
        self._most_inputs = {name: _most_inputs(tensor) for name, tensor in tuned.items()}
        self.factors: dict[str, list[Factors]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``; if it is ``linear`` with a tuned weight, as :class:`_Linear`."""
        kwargs = kwargs or {}
        name = self._names.get(id(args[1])) if func is linear and len(args) > 1 else None
        if name is None or args[0].dim() < 2 or args[1].dim() != 2:
            return func(*args, **kwargs)
        inputs, weight, bias = args[0], args[1], args[2] if len(args) > 2 else kwargs.get("bias")
        rows = inputs.flatten(0, -2)
        if len(rows) > self._most_inputs[name]:
            return func(*args, **kwargs)
        outputs: Tensor = _Linear.apply(rows, weight, bias, self.factors.setdefault(name, []).append)
        return outputs.unflatten(0, inputs.shape[:-1])


class _Linear(torch.autograd.Function):
    """A linear map of inputs of shape (n, in), whose backward pass keeps the factors of the weight's gradient."""

    @staticmethod
    def forward(
        ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, keep: Callable[[Factors], None]
    ) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.keep = keep
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.keep(Factors(gradient, inputs.detach()))
        of_inputs, _, of_bias, _ = ctx.needs_input_grad
        return gradient @ weight if of_inputs else None, None, gradient.sum(dim=0) if of_bias else None, None
