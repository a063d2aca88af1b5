"""Two-point estimates along Gaussian directions."""

from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext
from slzo.zo.estimators.finite_differences import finite_differences
from slzo.zo.noise import gaussian


class SPSA(Estimator):
    r"""Two-point estimate along random directions (SPSA; MeZO, arXiv 2305.17333, definition 1).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w - \epsilon z_i)}{2 \epsilon} z_i

    Its expectation is the gradient, up to a term of order :math:`\epsilon^2`. Each query costs two evaluations, an antithetic
    pair. The entries of the directions are standard normal, as in MeZO.
    """

    def estimate(self, context: EstimatorContext) -> Estimate:
        return finite_differences(context, gaussian, two_sided=True)[0]

    def evaluations(self, num_queries: int) -> float:
        return 2 * num_queries
