"""Two-point estimates along Gaussian or Rademacher directions."""

from typing import Literal

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Request
from slzo.zo.estimators.differences import two_point
from slzo.zo.noise import Noise, gaussian, rademacher

_NOISE: dict[str, Noise] = {"gaussian": gaussian, "rademacher": rademacher}


class SPSA(Estimator):
    r"""Two-point estimate along random directions (SPSA; MeZO, arXiv 2305.17333, definition 1).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w - \epsilon z_i)}{2 \epsilon} z_i

    Its expectation is the gradient, up to a term of order :math:`\epsilon^2`. Each query costs two evaluations, an antithetic
    pair.

    With ``divide_rows`` query i evaluates the i-th of q shares of the batch, so a step costs two evaluations in total. The
    expectation is the same. Let :math:`g = \sum_i h_i`, where :math:`h_i` is the contribution of share i. The squared error falls
    from :math:`(d + 1) |g|^2` to :math:`(d + 1) \sum_i |h_i|^2`: to 1/q of it if all shares have the same gradient, and not at
    all if their gradients are orthogonal.

    Args:
        noise: Entries of the directions: standard normal as in MeZO, or random signs as in Spall's SPSA.
        divide_rows: Evaluate each query on its own share of the batch; all directions of a step are held at once.
    """

    def __init__(self, noise: Literal["gaussian", "rademacher"] = "gaussian", divide_rows: bool = False) -> None:
        if noise not in _NOISE:
            raise SlzoError(f"model.estimator.noise {noise!r}: choose one of {', '.join(_NOISE)}")
        self.noise = noise
        self.divide_rows = divide_rows

    def estimate(self, request: Request) -> Estimate:
        return two_point(request, _NOISE[self.noise], self.divide_rows)

    def check(self, num_queries: int, batch_size: int | None = None) -> None:
        if self.divide_rows and batch_size is not None and num_queries > batch_size:
            raise SlzoError(
                f"model.num_queries {num_queries}: with model.estimator.divide_rows each query needs its own rows, and "
                f"data.batch_size is {batch_size}; lower model.num_queries or raise data.batch_size"
            )

    def evaluations(self, num_queries: int) -> float:
        return 2 if self.divide_rows else 2 * num_queries

    def directions_at_once(self, num_queries: int, queries_at_once: int) -> int:
        return num_queries if self.divide_rows else super().directions_at_once(num_queries, queries_at_once)

    def describe(self) -> str:
        noise = "" if self.noise == "gaussian" else f" with {self.noise.capitalize()} noise"
        return "SPSA" + noise + (" on divided rows" if self.divide_rows else "")
