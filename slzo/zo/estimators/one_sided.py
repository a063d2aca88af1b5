"""One-sided estimates with a base evaluation that all queries share: plain, and batched with normalized steps."""

import math
import statistics
from collections.abc import Sequence

from slzo.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Point, Request
from slzo.zo.estimators.spsa import two_point
from slzo.zo.noise import Noise, gaussian, rademacher
from slzo.zo.tuned import Direction

_NOWHERE: Direction = {}


def one_sided(request: Request, noise: Noise) -> tuple[Estimate, list[float]]:
    """The mean over the queries of ``(L(w + eps z) - L(w)) / eps z``, and the losses at ``w + eps z``."""
    tuned, eps = request.tuned, request.eps
    tuned.zero_grad()
    base: float | None = None
    losses: list[float] = []
    for queries in request.query_groups():
        directions = [tuned.draw(request.seed, request.step, query, noise) for query in queries]
        points = [Point(z, eps) for z in directions]
        if base is None:  # first, with the live weights at the masters: an empty direction moves nothing
            base, *found = request.loss.at([Point(_NOWHERE, 0.0), *points]).tolist()
        else:
            found = request.loss.at(points).tolist()
        losses += found
        if not all(map(math.isfinite, [base, *found])):
            tuned.zero_grad()
            break
        for z, loss in zip(directions, found, strict=True):
            tuned.accumulate_grad(z, (loss - base) / eps / request.num_queries, (eps, 0.0))
    assert base is not None
    estimate = Estimate(
        loss=base,
        loss_plus=sum(losses) / len(losses),
        loss_minus=base,
        projected_grad=tuple((loss - base) / eps for loss in losses),
        num_evaluations=1 + len(losses),
        finite=all(map(math.isfinite, [base, *losses])),
    )
    return estimate, losses


class OneSided(Estimator):
    r"""Forward differences from one base loss: q queries cost q + 1 evaluations.

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w)}{\epsilon} z_i, \quad z_i \sim N(0, I)

    Its mean differs from the gradient by a term of order :math:`\epsilon^2` only, since odd moments of z vanish, but each slope
    is off by the curvature, :math:`\epsilon z^T H z / 2`, which adds variance that two-point slopes do not have.
    """

    def estimate(self, request: Request) -> Estimate:
        """See :class:`Estimator`."""
        return one_sided(request, gaussian)[0]


class FZO(Estimator):
    r"""Batched one-sided differences along random signs, the step divided by the spread of the losses (FZO).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon u_i) - L(w)}{\sigma} u_i, \quad u_i \in \{-1, 1\}^d

    with :math:`\sigma` the standard deviation of the q losses. Taken from FZO: random signs in one batch, one base loss, division
    by the losses' spread. Here :math:`\sigma` stands in the place of :math:`\epsilon`, so that the learning rate does not depend
    on :math:`\epsilon`: it is about the length of a step per coordinate times :math:`\sqrt q`, as in normalized descent.
    Needs model.num_queries >= 2; 8 is usual. model.queries_at_once of the same size puts them in one batch.

    Args:
        antithetic: Evaluate at w + eps u and w - eps u, without a base: twice the evaluations, no curvature in the slopes.
    """

    def __init__(self, antithetic: bool = False) -> None:
        self.antithetic = antithetic

    def check(self, num_queries: int, batch_size: int | None = None) -> None:
        """See :class:`Estimator`: one query has no spread."""
        if num_queries < 2:
            raise SlzoError(
                f"model.num_queries {num_queries}: FZO divides by the spread of several losses, give at least 2, 8 is usual"
            )

    def estimate(self, request: Request) -> Estimate:
        """See :class:`Estimator`.

        Raises:
            SlzoError: There is one query only.
        """
        self.check(request.num_queries)
        if self.antithetic:
            estimate = two_point(request, rademacher)
            # the spread of L along random directions is eps times that of the slopes
            losses: Sequence[float] = [request.eps * slope for slope in estimate.projected_grad]
        else:
            estimate, losses = one_sided(request, rademacher)
        if estimate.finite:
            spread = statistics.stdev(losses)
            # equal losses say nothing, as with a metric that no direction changes: no step then
            request.tuned.scale_grad(request.eps / spread if spread > 0 else 0.0)
        return estimate

    def describe(self) -> str:
        """See :class:`Estimator`."""
        return "FZO(antithetic)" if self.antithetic else "FZO"
