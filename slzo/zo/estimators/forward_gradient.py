"""Exact slopes by forward-mode differentiation, as a reference."""

from torch import Tensor

from slzo.zo.estimators.base import Estimate, Estimator, Request


class ForwardGradient(Estimator):
    r"""Exact slopes along Gaussian directions by forward-mode differentiation (Baydin et al., arXiv 2202.08587).

    .. math:: \hat g = \frac{1}{q} \sum_i (\nabla L(w) \cdot z_i) \, z_i, \quad z_i \sim N(0, I)

    Unbiased, with the variance of SPSA, but without :math:`\epsilon` and without rounding. A query evaluates the loss together
    with its derivative, which costs about three plain evaluations. For comparison: needs attention without a fused kernel, and
    no oneDNN.
    """

    differentiates = True

    def estimate(self, request: Request) -> Estimate:
        gradient: dict[str, Tensor] = {}
        losses: list[float] = []
        slopes: list[float] = []
        for query in range(request.num_queries):
            direction = request.tuned.draw(request.seed, request.step, query)
            loss, slope = request.loss.slope(direction)
            losses.append(loss)
            slopes.append(slope)
            request.tuned.accumulate(gradient, direction, slope / request.num_queries)
            del direction  # freed before the next one is drawn
        mean = sum(losses) / len(losses)
        return Estimate(mean, mean, mean, tuple(slopes), 3 * len(losses), gradient)

    def evaluations(self, num_queries: int) -> float:
        return 3 * num_queries
