"""Gradient estimates from loss values alone."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from torch import Tensor

from slzo.errors import SlzoError
from slzo.zo.tuned import Direction, TunedTensors


class Point(NamedTuple):
    """A place to evaluate the loss: ``masters + scale * direction``."""

    direction: Direction
    scale: float


Evaluate = Callable[[Sequence[Point]], Tensor]
"""Losses at several points, shape (P,), float32, averaged over every process."""


@dataclass(frozen=True)
class Estimate:
    """What one step learned.

    Attributes:
        loss_plus: Loss at ``w + eps z``, mean over queries.
        loss_minus: Loss at ``w - eps z``, mean over queries.
        projected_grad: ``(loss_plus - loss_minus) / (2 eps)`` of each query.
        finite: ``False`` if any loss was infinite or NaN; the gradients are then not set.
    """

    loss_plus: float
    loss_minus: float
    projected_grad: tuple[float, ...]
    finite: bool


class Estimator(Protocol):
    """Fills the masters' gradients and leaves the live weights wherever the last evaluation put them."""

    def estimate(self, tuned: TunedTensors, evaluate: Evaluate, seed: int, step: int) -> Estimate:
        """Estimate the gradient at the masters with directions drawn from (seed, step, query)."""


class SPSA:
    r"""Two-point estimate along Gaussian directions (SPSA; MeZO, arXiv 2305.17333, definition 1).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w - \epsilon z_i)}{2 \epsilon} z_i,
              \quad z_i \sim N(0, I)

    Its mean is the gradient, up to a term of order :math:`\epsilon^2`.

    Args:
        eps: Size of the perturbation, absolute, > 0.
        num_queries: Directions per step (q), >= 1. Each costs two evaluations.

    Raises:
        SlzoError: An argument is out of range.
    """

    def __init__(self, eps: float = 1e-3, num_queries: int = 1) -> None:
        if not 0 < eps < float("inf"):
            raise SlzoError(f"model.eps {eps}: the perturbation must be a number above 0; 1e-3 is a good start")
        if num_queries < 1:
            raise SlzoError(f"model.num_queries {num_queries}: at least 1 direction per step is needed")
        self.eps = eps
        self.num_queries = num_queries

    def estimate(self, tuned: TunedTensors, evaluate: Evaluate, seed: int, step: int) -> Estimate:
        """See :class:`Estimator`."""
        plus, minus, projected = [], [], []
        tuned.zero_grad()
        for query in range(self.num_queries):
            direction = tuned.draw(seed, step, query)
            losses = evaluate([Point(direction, self.eps), Point(direction, -self.eps)])
            loss_plus, loss_minus = losses.tolist()
            gradient = (loss_plus - loss_minus) / (2 * self.eps)
            plus.append(loss_plus)
            minus.append(loss_minus)
            projected.append(gradient)
            if not (math.isfinite(loss_plus) and math.isfinite(loss_minus)):
                tuned.zero_grad()
                break
            tuned.accumulate_grad(tuned.applied(direction, self.eps), gradient / self.num_queries)
        else:
            return Estimate(sum(plus) / len(plus), sum(minus) / len(minus), tuple(projected), finite=True)
        return Estimate(sum(plus) / len(plus), sum(minus) / len(minus), tuple(projected), finite=False)
