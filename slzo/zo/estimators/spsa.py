"""Two-point estimates along Gaussian or Rademacher directions."""

from collections.abc import Mapping
from typing import Literal

from slzo.utils.errors import check_choice
from slzo.zo.estimators.base import Estimate, Estimator, Request
from slzo.zo.estimators.finite_differences import finite_differences
from slzo.zo.noise import Noise, gaussian, rademacher

NoiseName = Literal["gaussian", "rademacher"]

_NOISE: Mapping[NoiseName, Noise] = {"gaussian": gaussian, "rademacher": rademacher}


class SPSA(Estimator):
    r"""Two-point estimate along random directions (SPSA; MeZO, arXiv 2305.17333, definition 1).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w - \epsilon z_i)}{2 \epsilon} z_i

    Its expectation is the gradient, up to a term of order :math:`\epsilon^2`. Each query costs two evaluations, an antithetic
    pair.

    Args:
        noise: Entries of the directions: standard normal as in MeZO, or random signs as in Spall's SPSA.
    """

    def __init__(self, noise: NoiseName = "gaussian") -> None:
        check_choice("model.estimator.noise", noise, NoiseName)
        self.noise: NoiseName = noise

    def estimate(self, request: Request) -> Estimate:
        return finite_differences(request, _NOISE[self.noise], two_sided=True)[0]

    def evaluations(self, num_queries: int) -> float:
        return 2 * num_queries

    def describe(self) -> str:
        return "SPSA" if self.noise == "gaussian" else f"SPSA with {self.noise.capitalize()} noise"
