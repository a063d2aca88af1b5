"""Gradients of linear maps' weights as factors, which are smaller than the weights if a map has few inputs.

Let a linear map with the weight W, shape (out, in), be applied to n inputs X, shape (n, in), and let G, shape (n, out), be the
gradient with respect to its outputs. Then W has the gradient :math:`G^T X`. Processes that exchange G and X send n (in + out)
elements instead of in * out (sufficient factors; Xie et al. 2015, arXiv 1511.08486).
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, pad
from torch.overrides import TorchFunctionMode

from slzo.zo.derivatives import live_vjp, vjp
from slzo.zo.processes import Part, sum_tensors
from slzo.zo.tuned import Direction, TunedTensors

# Factors are exchanged if those of all processes have at most this share of the gradient's elements. Every process multiplies the
# factors of all, so with many inputs this takes longer than sending the gradient.
_LARGEST_SHARE = 0.25


FactoredVjp = tuple[Tensor, Callable[[Tensor], "FactoredGradient"]]


class Factors(NamedTuple):
    """The gradient of a linear map's weight.

    Attributes:
        outputs: Gradient with respect to the outputs, shape (n, out).
        inputs: Inputs, shape (n, in), dtype as ``outputs``.
    """

    outputs: Tensor
    inputs: Tensor

    @classmethod
    def joined(cls, parts: Iterable["Factors"]) -> "Factors":
        """Return the factors of a sum of gradients."""
        outputs, inputs = zip(*parts, strict=True)
        return cls(torch.cat(outputs), torch.cat(inputs))

    def product(self) -> Tensor:
        """Return the gradient, shape (out, in)."""
        return self.outputs.T @ self.inputs


@dataclass
class FactoredGradient:
    """The gradient of the masters, partly in factors. It is the sum of both parts.

    Attributes:
        whole: Gradients of masters, float32.
        factors: Factors of the gradients of the model's own tensors, at least one for each name.
    """

    whole: dict[str, Tensor] = field(default_factory=dict)
    factors: dict[str, list[Factors]] = field(default_factory=dict)

    def add(self, more: "FactoredGradient") -> None:
        """Add another gradient, in place."""
        add_gradient(self.whole, more.whole)
        for name, parts in more.factors.items():
            self.factors.setdefault(name, []).extend(parts)

    def total(
        self, sums: Tensor, tuned: TunedTensors, rows: Part, sum_rows: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Direction]:
        """Return ``sums`` and the gradient, both added up over the processes. All processes get the same bits.

        Args:
            sums: Numbers of this process, shape (N,), float32.
            tuned: The masters.
            rows: The part of the rows that this process has.
            sum_rows: Returns the sum of a tensor over the processes.
        """
        factors = {name: Factors.joined(parts) for name, parts in self.factors.items()}
        counts = sums.new_zeros(rows.total, len(factors))
        for column, own in enumerate(factors.values()):
            counts[rows.number, column] = len(own.inputs)
        summed = sum_rows(torch.cat([sums, counts.flatten()]))
        sums, counts = summed[: len(sums)], summed[len(sums) :].view_as(counts)
        sent: dict[str, Tensor] = {}
        whole = dict(self.whole)
        by_name = counts.T.int().tolist() if factors else []  # an empty list too would wait for the device
        for (name, own), numbers in zip(factors.items(), by_name, strict=True):
            both, number = torch.cat(own, dim=1), sum(numbers)
            if number * both.shape[1] <= _LARGEST_SHARE * tuned.named_masters()[name].numel():
                before = sum(numbers[: rows.number])
                sent[name] = pad(both, (0, 0, before, number - before - len(both)))
            else:
                add_gradient(whole, tuned.pull_back({name: own.product()}))
        # the sums of factors are exact: all other terms are 0
        received = sum_tensors(sum_rows, [*whole.values(), *sent.values()])
        total = dict(zip(whole, received, strict=False))
        for name, both in zip(sent, received[len(whole) :], strict=True):
            outputs, inputs = both.tensor_split([factors[name].outputs.shape[1]], dim=1)
            add_gradient(total, tuned.pull_back({name: Factors(outputs, inputs).product()}))
        return sums, {name: total[name] for name in tuned.names}


def add_gradient(gradient: dict[str, Tensor], more: Mapping[str, Tensor]) -> None:
    """Add a gradient to another one, in place."""
    for name, own in more.items():
        gradient[name] = gradient[name].add_(own) if name in gradient else own


def whole_vjp(module: nn.Module, tuned: TunedTensors, function: Callable[[], Tensor]) -> FactoredVjp:
    """Do the same as :func:`slzo.zo.derivatives.vjp`; no gradient is in factors."""
    output, pull_back = vjp(module, tuned, function)
    return output, lambda gradient: FactoredGradient(pull_back(gradient))


def factored_vjp(module: nn.Module, tuned: TunedTensors, function: Callable[[], Tensor]) -> FactoredVjp:
    """Do the same as :func:`slzo.zo.derivatives.vjp`; gradients of weights of linear maps are in factors.

    If ``function`` also uses such a weight in another way, the gradient of that use is whole.
    """
    mode = _KeptFactors(tuned)

    def keeping() -> Tensor:
        with mode:
            return function()

    output, pull_back = live_vjp(module, tuned, keeping)

    def factored(gradient: Tensor) -> FactoredGradient:
        live = pull_back(gradient)
        factors = {name: parts for name, parts in mode.factors.items() if parts}
        whole = tuned.pull_back(live, [name for name in tuned.names if name in live or name not in factors])
        return FactoredGradient(whole, factors)

    return output, factored


class _KeptFactors(TorchFunctionMode):
    """Keeps the factors of tuned weights' gradients in the backward pass."""

    def __init__(self, tuned: TunedTensors) -> None:
        super().__init__()
        self._weights = {name: tensor.live for name, tensor in tuned.items()}
        self.factors: dict[str, list[Factors]] = {}

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Call ``func``; if it is ``linear`` with a tuned weight, as :class:`_Linear`."""
        kwargs = kwargs or {}
        if func is linear and len(args) > 1:
            for name, weight in self._weights.items():
                if _is_same(args[1], weight):
                    inputs, bias = args[0], args[2] if len(args) > 2 else kwargs.get("bias")
                    kept = self.factors.setdefault(name, [])
                    outputs: Tensor = _Linear.apply(inputs.flatten(0, -2), args[1], bias, kept)
                    return outputs.unflatten(0, inputs.shape[:-1])
        return func(*args, **kwargs)


def _is_same(tensor: Tensor, other: Tensor) -> bool:
    return tensor.data_ptr() == other.data_ptr() and tensor.shape == other.shape and tensor.stride() == other.stride()


class _Linear(torch.autograd.Function):
    """A linear map of inputs of shape (n, in), whose backward pass appends the factors of the weight's gradient to a list."""

    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: Tensor, bias: Tensor | None, kept: list[Factors]) -> Tensor:
        ctx.save_for_backward(inputs, weight)
        ctx.kept = kept
        return linear(inputs, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None, None]:
        inputs, weight = ctx.saved_tensors
        ctx.kept.append(Factors(gradient, inputs.detach()))
        of_inputs, _, of_bias, _ = ctx.needs_input_grad
        return gradient @ weight if of_inputs else None, None, gradient.sum(dim=0) if of_bias else None, None
