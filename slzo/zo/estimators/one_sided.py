"""One-sided estimates with one base evaluation for all queries."""

from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext
from slzo.zo.estimators.finite_differences import finite_differences
from slzo.zo.noise import gaussian


class OneSided(Estimator):
    r"""Forward differences from one base loss: q queries cost q + 1 evaluations.

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w)}{\epsilon} z_i, \quad z_i \sim N(0, I)

    Its expectation differs from the gradient only by a term of order :math:`\epsilon^2`, since odd moments of z vanish. The
    curvature adds an error of :math:`\epsilon z^T H z / 2` to each slope, a variance that two-point slopes do not have.
    """

    def estimate(self, context: EstimatorContext) -> Estimate:
        return finite_differences(context, gaussian, two_sided=False)[0]

    def evaluations(self, num_queries: int) -> float:
        return 1 + num_queries
