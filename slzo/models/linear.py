"""Matrix products through oneDNN where it is faster than torch's default.

On CPUs that are not Intel's, torch's float32 ``linear`` runs MKL code for AVX2 only, while oneDNN uses AVX-512: on a Zen 5 core
255 against 114 GFLOP/s (on Zen 4, whose AVX-512 units are half as wide, 105 against 97). oneDNN packs the weights on the fly:
they can change between calls, and no copy takes memory.
"""

from statistics import median
from timeit import timeit
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from slzo.models.quantization import is_plain
from slzo.models.stand_ins import StandIn
from slzo.private.modules import copy_modules, has_onednn_linear, onednn_linear

# Rows of the timed product, about as many as the tokens of a small batch.
_TRIAL_ROWS = 128
# With fewer output features oneDNN is not faster (SmolLM2-135M, 1 to 400 rows).
_ONEDNN_TOKENS = 64
# Near 1 both are equally fast, and the choice should not depend on noise.
_CLEAR_GAIN = 1.25


class OneDNNLinear(StandIn):
    """Runs a float32 ``nn.Linear`` on the CPU through oneDNN and shares its weights."""

    def forward(self, inputs: Tensor) -> Tensor:
        """Apply the linear map; the result has shape (..., out_features).

        With autograd on, and in half precision, torch's own product is used.
        """
        linear: Any = self.replaced[0]
        return _apply(inputs, linear.weight, linear.bias)


class SelectedHead(StandIn):
    """The language-model head, restricted to a few tokens of the vocabulary.

    Args:
        head: The head, a plain linear map.
        onednn: Use oneDNN where it is faster.
    """

    token_ids: Tensor

    def __init__(self, head: nn.Module, onednn: bool) -> None:
        super().__init__(head)
        self.onednn = onednn

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Return the logits of ``token_ids``, shape (..., K)."""
        dtype = hidden_states.dtype  # may be float32 in a model of half precision
        bias = None if self.bias is None else self.bias.index_select(0, self.token_ids).to(dtype)
        apply = _apply if self.onednn and self.token_ids.numel() >= _ONEDNN_TOKENS else F.linear
        return apply(hidden_states, self.weight.index_select(0, self.token_ids).to(dtype), bias)


def _apply(inputs: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    # oneDNN's product has no derivative, and few processors have one for float16; the model may have been moved after the timing
    is_ready = inputs.device.type == "cpu" and inputs.dtype == torch.float32 and not torch.is_grad_enabled()
    return (onednn_linear if is_ready else F.linear)(inputs, weight, bias)


def with_onednn(module: nn.Module) -> nn.Module:
    """Copy a module tree with a :class:`OneDNNLinear` for each plain ``nn.Linear``; the weights are shared."""
    return copy_modules(module, lambda child: OneDNNLinear(child) if is_plain_linear(child) else None)


@torch.no_grad()
def onednn_is_faster(module: nn.Module) -> bool:
    """Whether oneDNN is clearly faster for the largest linear of a module, measured in a few milliseconds.

    Returns ``False`` unless the module is in float32 on a CPU: elsewhere torch already uses the fastest kernel.
    """
    linears = [child for child in module.modules() if is_plain_linear(child)]
    if not linears or not has_onednn_linear():
        return False
    largest = max(linears, key=lambda linear: linear.weight.numel())
    if largest.weight.is_meta:  # the values are elsewhere; any others have the same timing
        largest = nn.Linear(largest.in_features, largest.out_features, dtype=largest.weight.dtype)
    if largest.weight.dtype != torch.float32 or largest.weight.device.type != "cpu":
        return False
    inputs = torch.ones(_TRIAL_ROWS, largest.in_features)
    fast = OneDNNLinear(largest)
    try:
        onednn, plain = [], []
        for _ in range(8):
            onednn.append(timeit(lambda: fast(inputs), number=1))
            plain.append(timeit(lambda: F.linear(inputs, largest.weight, largest.bias), number=1))
    except RuntimeError:  # a build of torch without the kernel
        return False
    # both, as other programs slow down single products
    gains = min(plain) / min(onednn), median(slow / fast for slow, fast in zip(plain, onednn, strict=True))
    return min(gains) > _CLEAR_GAIN


def is_plain_linear(module: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether a module is an unquantized ``nn.Linear``."""
    return type(module) is nn.Linear and is_plain(module.weight)
