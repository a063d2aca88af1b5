"""Batched differences along random signs, divided by the spread of the losses."""

import statistics
from collections.abc import Sequence

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Request
from slzo.zo.estimators.differences import one_sided, two_point
from slzo.zo.noise import rademacher


class FZO(Estimator):
    r"""Batched one-sided differences along random signs, the step divided by the spread of the losses (FZO).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon u_i) - L(w)}{\sigma} u_i, \quad u_i \in \{-1, 1\}^d

    where :math:`\sigma` is the standard deviation of the q losses. Taken from FZO: random signs in one batch, one base loss,
    division by the spread of the losses. Here :math:`\sigma` replaces :math:`\epsilon`, so the learning rate does not depend on
    the latter. It is about the length of a step per coordinate times :math:`\sqrt q`, as in normalized descent.
    Needs model.num_queries >= 2; 8 is usual. model.engine.queries_at_once of the same size evaluates all in one batch.

    Args:
        antithetic: Evaluate at w + eps u and w - eps u, without a base loss: twice the evaluations, no curvature in the slopes.
    """

    normalizes = True

    def __init__(self, antithetic: bool = False) -> None:
        self.antithetic = antithetic

    def check(self, num_queries: int) -> None:
        if num_queries < 2:
            raise SlzoError(
                f"model.num_queries {num_queries}: FZO divides by the spread of several losses; give at least 2 (8 is usual)"
            )

    def estimate(self, request: Request) -> Estimate:
        self.check(request.num_queries)
        if self.antithetic:
            estimate = two_point(request, rademacher)
            # the spread of L along random directions is eps times that of the slopes
            losses: Sequence[float] = [request.eps * slope for slope in estimate.projected_grad]
        else:
            estimate, losses = one_sided(request, rademacher)
        if estimate.finite:
            spread = statistics.stdev(losses)
            # take no step if all losses are equal, as with a metric that no direction changes
            estimate.scale_gradient(request.eps / spread if spread > 0 else 0.0)
        return estimate

    def evaluations(self, num_queries: int) -> float:
        return 2 * num_queries if self.antithetic else 1 + num_queries

    def describe(self) -> str:
        return "FZO(antithetic)" if self.antithetic else "FZO"
