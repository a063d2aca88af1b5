"""A learning rate for Adam from the size of the tuned weights."""

import math
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, Self

from torch.optim import Optimizer

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator
from slzo.zo.optim import gradient_power
from slzo.zo.tensors import Subspace
from slzo.zo.tuned import TunedTensors

# Share of the size of the weights that Adam moves an element by in the first step. An element has to move further if weights are
# moved by a product of two matrices, one of which begins at 0 (LoRA), or along fixed directions (ActivationSubspace). The largest
# was best of 0.005, 0.02, 0.08 and 0.2 for LoRA, and of 0.005 and 0.05 for the subspace (SmolLM2-135M, layer 28, SST-2).
_SHARE, _PRODUCT_SHARE, _DIRECTION_SHARE = 0.005, 0.2, 0.05
# After this many steps the rate is halved.
_HALF_STEPS = 100


@dataclass
class RelativeRate:
    r"""A learning rate for optimizers that divide the gradient by its size.

    Adam moves every element by about the learning rate, whatever the size of the gradient. The rate is a share of the root mean
    square r of the tuned matrices, and falls with the number of steps t, so that noise averages out:

    .. math:: \eta_t = \kappa \, r \, / \, (1 + t / 100)

    Attributes:
        size: Root mean square of the tuned matrices before training, without those that are 0.
        share: :math:`\kappa`: 0.005; 0.2 for LoRA; 0.05 for the coordinates of a subspace.
        steps: Steps so far.
        factor: Factor of the rate, halved at each rollback.
        eps: ``None``: there is no perturbation of weights.
        evaluations: 0: nothing is measured by forward passes.
    """

    size: float
    share: float = _SHARE
    steps: int = 0
    factor: float = 1.0
    eps: ClassVar[None] = None
    evaluations: ClassVar[int] = 0

    @classmethod
    def of(cls, tuned: TunedTensors, multiplies: bool = False) -> Self:
        """Return the rate for some tuned tensors.

        Args:
            tuned: The tensors.
            multiplies: Whether they are matrices whose products move the weights, as in LoRA.

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

    def clip_factor(self, estimate: Estimate) -> float:
        """Return 1: these optimizers divide the gradient by its size."""
        return 1.0

    def update(self, estimate: Estimate) -> None:
        """Count a step."""
        self.steps += 1

    def rate(self, optimizer: Optimizer, estimator: Estimator) -> float:
        """Return the learning rate for the next step."""
        _, share = gradient_power(optimizer)
        return share * self.factor * self.share * self.size / (1 + self.steps / _HALF_STEPS)

    def describe(self, sets_rate: bool = True) -> str:
        """Describe the rate in one line."""
        return (
            f"Step size: learning rate {self.share * self.size:.2g}, {self.share:.1%} of the size of the tuned weights"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return primitives only, for checkpoints."""
        return asdict(self)
