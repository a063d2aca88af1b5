"""Matrix products through oneDNN where that beats torch's default.

On CPUs that are not Intel's, torch's float32 ``linear`` runs MKL code for AVX2 only, while oneDNN uses AVX-512: on a Zen 5 core
255 against 114 GFLOP/s (on Zen 4, with AVX-512 units of half the width, 105 against 97). The weights stay as they are, oneDNN
packs them on the fly, so perturbed weights and memory are no concern.
"""

import copy
from timeit import timeit
from typing import TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slzo.models.quantization import is_plain

# Rows of the probe product: about the tokens of a small batch.
_TRIAL_ROWS = 128
# Near one both are as good, and the choice should not depend on noise.
_CLEAR_GAIN = 1.25


class OneDNNLinear(nn.Module):
    """Computes what a given ``nn.Linear``, float32 and on the CPU, does; shares its weights."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self._linear = (linear,)  # in a tuple, so that it is not registered as a submodule a second time

    @property
    def weight(self) -> Tensor:
        """The linear's own weight."""
        return self._linear[0].weight

    @property
    def bias(self) -> Tensor | None:
        """The linear's own bias."""
        return self._linear[0].bias

    def forward(self, inputs: Tensor) -> Tensor:
        """The product, shape (..., out_features)."""
        if inputs.device.type != "cpu":  # the model was moved after the timing
            return F.linear(inputs, self.weight, self.bias)
        return torch.ops.mkldnn._linear_pointwise(inputs, self.weight, self.bias, "none", [], "")


def with_onednn(module: nn.Module) -> nn.Module:
    """A shallow copy of a module tree with a :class:`OneDNNLinear` for each plain ``nn.Linear``; the original stays untouched."""
    if _is_plain_linear(module):
        return OneDNNLinear(module)
    twin = copy.copy(module)
    twin._modules = {name: None if child is None else with_onednn(child) for name, child in module._modules.items()}
    return twin


@torch.no_grad()
def onednn_is_faster(module: nn.Module) -> bool:
    """Whether oneDNN clearly wins for the largest linear of a module, by timing them for a few milliseconds.

    ``False`` unless the module is in float32 on a CPU: elsewhere torch already takes the best there is.
    """
    linears = [child for child in module.modules() if _is_plain_linear(child)]
    if not linears or not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return False
    largest = max(linears, key=lambda linear: linear.weight.numel())
    if largest.weight.is_meta:  # its values are on disk; any do
        largest = nn.Linear(largest.in_features, largest.out_features, dtype=largest.weight.dtype)
    if largest.weight.dtype != torch.float32 or largest.weight.device.type != "cpu":
        return False
    inputs = torch.ones(_TRIAL_ROWS, largest.in_features)
    probe = OneDNNLinear(largest)
    try:
        ours, plain = [], []
        for _ in range(8):
            ours.append(timeit(lambda: probe(inputs), number=1))
            plain.append(timeit(lambda: F.linear(inputs, largest.weight, largest.bias), number=1))
    except RuntimeError:  # a build of torch without the kernel
        return False
    return min(plain) > _CLEAR_GAIN * min(ours)


def _is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether it is an ``nn.Linear`` that no quantization has changed."""
    return type(module) is nn.Linear and is_plain(module.weight)
