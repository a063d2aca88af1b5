"""Evolution strategies: directions of a population, weighted by shaped losses."""

import math
import statistics
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from typing import Literal

from torch import Tensor

from slzo.utils.argument_checks import check_at_least, check_choice
from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext, check_has_matrices
from slzo.zo.noise import gaussian, low_rank
from slzo.zo.tuned import Direction, Point, TunedTensors

Shaping = Literal["zscore", "rank"]


class EvolutionStrategy(Estimator):
    r"""The mean of a population's directions, each weighted by the shaped loss of its member (evolution strategies).

    .. math:: \hat g = \frac{1}{n} \sum_j f_j \, e_j, \quad L_j = L(w + \epsilon e_j)

    q = model.num_queries directions z are drawn. With ``antithetic`` the population has n = 2 q members, e = z and e = -z of
    each direction; otherwise n = q members, e = z. :math:`\bar L` and :math:`\sigma` are mean and standard deviation of the n
    losses. f is

    * zscore: :math:`(L_j - \bar L) / \sigma`. With ``antithetic`` this is the estimate of SPSA divided by
      :math:`\sigma / \epsilon`, about the length of the gradient. So the learning rate depends neither on :math:`\epsilon` nor on
      the scale of loss or reward, as for FZOO.
    * rank: the zscore of the losses' ranks, where equal losses share a rank. So the weight of an outlier does not depend on its
      distance. Salimans et al. use ranks from -1/2 to 1/2, which are :math:`1 / \sqrt{12}` times these in a large population.

    If all losses are equal, f is 0. Losses replace negative returns, since the optimizer descends. The logged slopes are those
    of the loss itself, (L+ - L-) / (2 eps) or (L - mean of the others) / eps, for any shaping. A direction is drawn again for
    the update unless all are evaluated together (model.engine.queries_at_once).

    After Salimans et al. 2017, arXiv 1703.03864 (antithetic pairs, ranks); Qiu et al. 2025, arXiv 2509.24372 (z-scores, no
    pairs); Sarkar et al. 2025, arXiv 2511.16652 (EGGROLL: directions of low rank).

    Args:
        shaping: How losses become weights: zscore or rank.
        antithetic: Use two members for each direction, on either side of the weights.
        direction_rank: Directions of matrices are U V^T / sqrt(r) of this rank r, with U and V drawn for each direction; left
            out, they are of full rank. Needs a scope that tunes complete matrices.
    """

    normalizes = True

    def __init__(self, shaping: Shaping = "zscore", antithetic: bool = True, direction_rank: int | None = None) -> None:
        check_choice("model.estimator.shaping", shaping, Shaping)
        check_at_least("model.estimator.direction_rank", direction_rank, advice="leave it out for full rank")
        self.shaping = shaping
        self.antithetic = antithetic
        self.direction_rank = direction_rank
        self._noise = gaussian if direction_rank is None else low_rank(direction_rank, None)

    def check(self, num_queries: int) -> None:
        if not self.antithetic and num_queries < 2:
            raise SlzoError(
                f"model.num_queries {num_queries}: EvolutionStrategy compares the members of a population; give at least 2, or "
                "leave model.estimator.antithetic true"
            )

    def check_tuned(self, tuned: TunedTensors) -> None:
        if self.direction_rank is not None:
            check_has_matrices(tuned, "EvolutionStrategy.direction_rank")

    def estimate(self, context: EstimatorContext) -> Estimate:
        signs = (1, -1) if self.antithetic else (1,)
        losses: list[float] = []
        held: dict[int, Direction] = {}
        for queries in context.query_batches():
            held.clear()  # freed before the next ones are drawn
            held.update((query, self._draw(context, query)) for query in queries)
            losses += context.loss.at([Point(z, sign * context.eps) for z in held.values() for sign in signs]).tolist()
        if len(held) < context.num_queries:
            held.clear()
        slopes = self._slopes(losses, context.eps)
        gradient: dict[str, Tensor] = {}
        if all(map(math.isfinite, losses)):
            ends = (context.eps, -context.eps if self.antithetic else 0.0)
            for query, weight in enumerate(self._weights(losses)):
                z = held.pop(query) if query in held else self._draw(context, query)
                context.tuned.accumulate(gradient, z, weight, ends)
                del z
        mean = sum(losses) / len(losses)
        plus, minus = (losses[:: len(signs)], losses[len(signs) - 1 :: len(signs)])
        return Estimate(
            loss=mean,
            loss_plus=sum(plus) / len(plus),
            loss_minus=sum(minus) / len(minus),
            projected_grad=tuple(slopes),
            num_evaluations=len(losses),
            gradient=gradient,
        )

    def _draw(self, context: EstimatorContext, query: int) -> Direction:
        return context.tuned.draw(context.seed, context.step, query, self._noise)

    def _slopes(self, losses: Sequence[float], eps: float) -> list[float]:
        """Slope of the loss along each direction."""
        if self.antithetic:
            return [(high - low) / (2 * eps) for high, low in _pairs(losses)]
        total, others = sum(losses), max(1, len(losses) - 1)
        return [(loss - (total - loss) / others) / eps for loss in losses]

    def _weights(self, losses: Sequence[float]) -> list[float]:
        """Factor of each direction in the estimate."""
        shaped = z_scores(losses if self.shaping == "zscore" else middle_ranks(losses))
        if self.antithetic:
            return [(high - low) / len(losses) for high, low in _pairs(shaped)]
        return [value / len(losses) for value in shaped]

    def evaluations(self, num_queries: int) -> float:
        return 2 * num_queries if self.antithetic else num_queries

    def describe(self) -> str:
        one_sided = "" if self.antithetic else ", without pairs"
        low = "" if self.direction_rank is None else f", directions of rank {self.direction_rank}"
        return f"EvolutionStrategy({self.shaping}{one_sided}{low})"


def z_scores(values: Sequence[float]) -> list[float]:
    """Return the distance of finite values from their mean, in standard deviations; 0 if all are equal."""
    mean, spread = statistics.fmean(values), statistics.pstdev(values)
    return [(value - mean) / spread if spread > 0 else 0.0 for value in values]


def middle_ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, counted from 0; equal values share the mean of their ranks."""
    order = sorted(values)
    return [(bisect_left(order, value) + bisect_right(order, value) - 1) / 2 for value in values]


def _pairs(values: Sequence[float]) -> Iterator[tuple[float, float]]:
    return zip(values[::2], values[1::2], strict=True)
