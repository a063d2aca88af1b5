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
        queries_at_once: Directions drawn and evaluated together, so that small batches can be paired over several queries;
            each takes the memory of the tuned tensors.

    Raises:
        SlzoError: An argument is out of range.
    """

    def __init__(self, eps: float = 1e-3, num_queries: int = 1, queries_at_once: int = 1) -> None:
        if not 0 < eps < float("inf"):
            raise SlzoError(f"model.eps {eps}: the perturbation must be a number above 0; 1e-3 is a good start")
        if num_queries < 1:
            raise SlzoError(f"model.num_queries {num_queries}: at least 1 direction per step is needed")
        if queries_at_once < 1:
            raise SlzoError(f"model.queries_at_once {queries_at_once}: must be at least 1")
        self.eps = eps
        self.num_queries = num_queries
        self.queries_at_once = queries_at_once

    def estimate(self, tuned: TunedTensors, evaluate: Evaluate, seed: int, step: int) -> Estimate:
        """See :class:`Estimator`."""
        plus: list[float] = []
        minus: list[float] = []
        tuned.zero_grad()
        finite = True
        for start in range(0, self.num_queries, self.queries_at_once):
            queries = range(start, min(start + self.queries_at_once, self.num_queries))
            directions = [tuned.draw(seed, step, query) for query in queries]
            losses = evaluate([Point(z, sign * self.eps) for z in directions for sign in (1, -1)]).tolist()
            plus += losses[::2]
            minus += losses[1::2]
            finite = all(map(math.isfinite, losses))
            if not finite:
                tuned.zero_grad()
                break
            for z, gradient in zip(directions, self._slopes(losses[::2], losses[1::2]), strict=True):
                tuned.accumulate_grad(tuned.applied(z, self.eps), gradient / self.num_queries)
        return Estimate(sum(plus) / len(plus), sum(minus) / len(minus), tuple(self._slopes(plus, minus)), finite)

    def _slopes(self, plus: Sequence[float], minus: Sequence[float]) -> list[float]:
        return [(high - low) / (2 * self.eps) for high, low in zip(plus, minus, strict=True)]
