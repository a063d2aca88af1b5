"""Two-point estimates: SPSA, and with directions of low rank."""

import math
from typing import Literal

from slzo.errors import SlzoError
from slzo.zo.estimators.base import WHOLE, Estimate, Estimator, Point, Request, Share
from slzo.zo.noise import Noise, gaussian, low_rank, rademacher

_NOISE: dict[str, Noise] = {"gaussian": gaussian, "rademacher": rademacher}


def two_point(request: Request, noise: Noise, split_rows: bool = False) -> Estimate:
    """The mean over the queries of ``(L(w + eps z) - L(w - eps z)) / (2 eps) z``; with ``split_rows`` each L is of other rows."""
    tuned, eps, count = request.tuned, request.eps, request.num_queries
    plus: list[float] = []
    minus: list[float] = []
    tuned.zero_grad()
    for queries in [range(count)] if split_rows else request.query_groups():
        directions = [tuned.draw(request.seed, request.step, query, noise) for query in queries]
        shares = [Share(query, count) if split_rows else WHOLE for query in queries]
        points = [Point(z, sign * eps, share) for sign in (1, -1) for z, share in zip(directions, shares, strict=True)]
        highs, lows = request.loss.at(points).view(2, -1).tolist()
        plus += highs
        minus += lows
        if not all(map(math.isfinite, highs + lows)):
            tuned.zero_grad()
            break
        for z, high, low in zip(directions, highs, lows, strict=True):
            tuned.accumulate_grad(z, (high - low) / (2 * eps) / count, (eps, -eps))
    mean_plus, mean_minus = sum(plus) / len(plus), sum(minus) / len(minus)
    return Estimate(
        loss=(mean_plus + mean_minus) / 2,
        loss_plus=mean_plus,
        loss_minus=mean_minus,
        projected_grad=tuple((high - low) / (2 * eps) for high, low in zip(plus, minus, strict=True)),
        num_evaluations=2 if split_rows else 2 * len(plus),
        finite=all(map(math.isfinite, plus + minus)),
    )


class SPSA(Estimator):
    r"""Two-point estimate along random directions (SPSA; MeZO, arXiv 2305.17333, definition 1).

    .. math:: \hat g = \frac{1}{q} \sum_i \frac{L(w + \epsilon z_i) - L(w - \epsilon z_i)}{2 \epsilon} z_i

    Its mean is the gradient, up to a term of order :math:`\epsilon^2`. Each query costs two evaluations, an antithetic pair.

    With ``split_rows`` the q queries share the rows out: query i takes its losses on the i-th of q parts of the batch, so that
    a step costs two evaluations in all. The mean is the same. With :math:`g = \sum_i h_i`, :math:`h_i` what the i-th part adds,
    the squared error falls from :math:`(d + 1) |g|^2` to :math:`(d + 1) \sum_i |h_i|^2`: to 1/q of it where all rows pull the
    same way, to nothing less where each pulls another way.

    Args:
        noise: Entries of the directions: standard normal as in MeZO, or random signs as in Spall's SPSA.
        split_rows: Each query takes its own part of the batch; all directions of a step are held at once.
    """

    def __init__(self, noise: Literal["gaussian", "rademacher"] = "gaussian", split_rows: bool = False) -> None:
        if noise not in _NOISE:
            raise SlzoError(f"model.estimator.noise {noise!r}: choose one of {', '.join(_NOISE)}")
        self.noise = noise
        self.split_rows = split_rows

    def estimate(self, request: Request) -> Estimate:
        """See :class:`Estimator`."""
        return two_point(request, _NOISE[self.noise], self.split_rows)

    def check(self, num_queries: int, batch_size: int | None = None) -> None:
        """See :class:`Estimator`."""
        if self.split_rows and batch_size is not None and num_queries > batch_size:
            raise SlzoError(
                f"model.num_queries {num_queries}: with model.estimator.split_rows each query takes rows of its own, and "
                f"data.batch_size is {batch_size}; lower the one or raise the other"
            )

    def directions_at_once(self, num_queries: int, queries_at_once: int) -> int:
        """See :class:`Estimator`."""
        return num_queries if self.split_rows else super().directions_at_once(num_queries, queries_at_once)

    def describe(self) -> str:
        """See :class:`Estimator`."""
        noise = "" if self.noise == "gaussian" else f" with {self.noise.capitalize()} noise"
        return "SPSA" + noise + (" on split rows" if self.split_rows else "")


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
        """See :class:`Estimator`.

        Raises:
            SlzoError: Nothing that is tuned is a matrix.
        """
        if all(master.dim() != 2 for master in request.tuned.masters):
            raise SlzoError(
                "model.estimator LOZO: this scope tunes single elements and no whole matrix that could move along low-rank "
                "directions; use SPSA"
            )
        return two_point(request, low_rank(self.rank, self.interval))

    def describe(self) -> str:
        """See :class:`Estimator`."""
        return f"LOZO(rank={self.rank}, interval={self.interval})"
