"""Two-point estimates: SPSA, and with directions of low rank."""

import math
from typing import Literal

from slzo.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, Point, Request
from slzo.zo.noise import Noise, gaussian, low_rank, rademacher

_NOISE: dict[str, Noise] = {"gaussian": gaussian, "rademacher": rademacher}


def two_point(request: Request, noise: Noise) -> Estimate:
    """The mean over the queries of ``(L(w + eps z) - L(w - eps z)) / (2 eps) z``."""
    tuned, eps = request.tuned, request.eps
    plus: list[float] = []
    minus: list[float] = []
    tuned.zero_grad()
    for queries in request.query_groups():
        directions = [tuned.draw(request.seed, request.step, query, noise) for query in queries]
        losses = request.loss.at([Point(z, sign * eps) for z in directions for sign in (1, -1)]).tolist()
        plus += losses[::2]
        minus += losses[1::2]
        if not all(map(math.isfinite, losses)):
            tuned.zero_grad()
            break
        for z, high, low in zip(directions, losses[::2], losses[1::2], strict=True):
            tuned.accumulate_grad(z, (high - low) / (2 * eps) / request.num_queries, (eps, -eps))
    mean_plus, mean_minus = sum(plus) / len(plus), sum(minus) / len(minus)
    return Estimate(
        loss=(mean_plus + mean_minus) / 2,
        loss_plus=mean_plus,
        loss_minus=mean_minus,
        projected_grad=tuple((high - low) / (2 * eps) for high, low in zip(plus, minus, strict=True)),
        num_evaluations=2 * len(plus),
        finite=all(map(math.isfinite, plus + minus)),
    )


class SPSA(Estimator):
    r"""Two-point estimate along random directions (SPSA; MeZO, arXiv 2305.17333, definition 1).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w - \epsilon z_i)}{2 \epsilon} z_i

    Its mean is the gradient, up to a term of order :math:`\epsilon^2`. Each query costs two evaluations, an antithetic pair.

    Args:
        noise: Entries of the directions: standard normal as in MeZO, or random signs as in Spall's SPSA.
    """

    def __init__(self, noise: Literal["gaussian", "rademacher"] = "gaussian") -> None:
        if noise not in _NOISE:
            raise SlzoError(f"model.estimator.noise {noise!r}: choose one of {', '.join(_NOISE)}")
        self.noise = noise

    def estimate(self, request: Request) -> Estimate:
        """See :class:`Estimator`."""
        return two_point(request, _NOISE[self.noise])


class LOZO(Estimator):
    r"""Two-point estimate along low-rank directions :math:`z = U V^T / \sqrt{r}` (after LOZO, arXiv 2410.07698).

    U is drawn for each query, V stays for some steps, so that these steps explore one subspace. What is taken from the paper is
    this sampling; the scale keeps entries at unit variance, so that eps and learning rates mean what they mean for SPSA.
    Averaged over V too, its mean is the gradient. The optimizer here sees the full matrix, not its factors.

    Args:
        rank: r, >= 1.
        interval: Steps between two draws of V, >= 1.
    """

    def __init__(self, rank: int = 2, interval: int = 50) -> None:
        for name, value in (("rank", rank), ("interval", interval)):
            if value < 1:
                raise SlzoError(f"model.estimator.{name} {value}: must be at least 1")
        self.rank = rank
        self.interval = interval

    def estimate(self, request: Request) -> Estimate:
        """See :class:`Estimator`."""
        return two_point(request, low_rank(self.rank, self.interval))

    def describe(self) -> str:
        """See :class:`Estimator`."""
        return f"LOZO(rank={self.rank}, interval={self.interval})"
