"""Batched one-sided differences along random signs, divided by the spread of the losses."""

import statistics

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext
from slzo.zo.estimators.finite_differences import finite_differences
from slzo.zo.noise import rademacher


class FZOO(Estimator):
    r"""Batched one-sided differences along random signs, the step divided by the spread of the losses (FZOO, arXiv 2506.09034).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon u_i) - L(w)}{\sigma} u_i, \quad u_i \in \{-1, 1\}^d

    where :math:`\sigma` is the standard deviation of the q losses. Taken from FZOO: random signs in one batch, one base loss,
    division by the spread of the losses. Here :math:`\sigma` replaces :math:`\epsilon`, so the learning rate does not depend on
    the latter. It is about the length of a step per coordinate times :math:`\sqrt q`, as in normalized descent.
    Needs model.num_queries >= 2; 8 is usual. model.engine.queries_at_once of the same size evaluates all in one batch.
    """

    normalizes = True

    def check(self, num_queries: int) -> None:
        if num_queries < 2:
            raise SlzoError(
                f"model.num_queries {num_queries}: FZOO divides by the spread of several losses; give at least 2 (8 is usual)"
            )

    def estimate(self, context: EstimatorContext) -> Estimate:
        estimate, losses = finite_differences(context, rademacher, two_sided=False)
        if estimate.finite:
            spread = statistics.stdev(losses)
            # take no step if all losses are equal, as with a metric that no direction changes
            estimate.scale_gradient(context.eps / spread if spread > 0 else 0.0)
        return estimate

    def evaluations(self, num_queries: int) -> float:
        return 1 + num_queries
