"""A learning rate for Adam from the size of the tuned weights."""

import math
from dataclasses import KW_ONLY, dataclass
from typing import Self

from torch.optim import Optimizer

from slzo.utils.errors import SlzoError
from slzo.zo.auto_step import AutoRate
from slzo.zo.estimators.base import Estimator
from slzo.zo.tuned import TunedTensors
from slzo.zo.tuned_tensor import Subspace

# Share of the size of the weights that Adam moves an element by in the first step. An element has to move further if weights are
# moved by a product of two matrices, one of which begins at 0 (LoRA), or along fixed directions (ActivationSubspace). The largest
# was best of 0.005, 0.02, 0.08 and 0.2 for LoRA, and of 0.005 and 0.05 for the subspace (SmolLM2-135M, layer 28, SST-2).
_SHARE, _PRODUCT_SHARE, _DIRECTION_SHARE = 0.005, 0.2, 0.05


@dataclass
class RelativeRate(AutoRate):
    r"""A learning rate for optimizers that divide the gradient by its size.

    Adam moves every element by about the learning rate, whatever the size of the gradient. The rate is a share of the root mean
    square r of the tuned matrices, and falls with the number of steps t, so that noise averages out:

    .. math:: \eta_t = \kappa \, r \, / \, (1 + t / 100)

    Attributes:
        size: Root mean square of the tuned matrices before training, without those that are 0.
        share: :math:`\kappa`: 0.005; 0.2 for LoRA; 0.05 for the coordinates of a subspace.
        eps: ``None``, since no weights are perturbed.
    """

    size: float
    share: float = _SHARE
    _: KW_ONLY
    eps: float | None = None

    @classmethod
    def of(cls, tuned: TunedTensors, multiplies: bool = False) -> Self:
        """Return the rate for some tuned tensors; ``multiplies`` says that their products move the weights, as in LoRA.

        Raises:
            SlzoError: All of them are 0.
        """
        nonzero = [tensor.live.detach() for _, tensor in tuned.items() if tensor.live.any()]
        chosen = [tensor for tensor in nonzero if tensor.dim() > 1] or nonzero
        squares = sum(float(tensor.float().square().sum()) for tensor in chosen)
        if not squares:
            raise SlzoError(
                "model.optimizer.lr auto: follows from the size of the tuned weights, and all of them are 0; give a number"
            )
        along = any(isinstance(tensor, Subspace) for _, tensor in tuned.items())
        share = _PRODUCT_SHARE if multiplies else _DIRECTION_SHARE if along else _SHARE
        return cls(math.sqrt(squares / sum(tensor.numel() for tensor in chosen)), share)

    def rate(self, optimizer: Optimizer, estimator: Estimator, num_queries: int) -> float:
        return self.share * self.size / self.divisor

    def describe(self, sets_rate: bool = True) -> str:
        return (
            f"Step size: learning rate {self.share * self.size:.2g}, {self.share:.1%} of the size of the tuned weights"
        )
