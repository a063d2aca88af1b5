"""Two-sided and one-sided finite differences of the loss along random directions. The estimators use them."""

from torch import Tensor

from slzo.zo.estimators.base import Estimate, Point, Request
from slzo.zo.noise import Noise


def two_point(request: Request, noise: Noise) -> Estimate:
    """Return the mean over the queries of ``(L(w + eps z) - L(w - eps z)) / (2 eps) z``."""
    tuned, eps = request.tuned, request.eps
    plus: list[float] = []
    minus: list[float] = []
    gradient: dict[str, Tensor] = {}
    for queries in request.queries_in_turn():
        directions = [tuned.draw(request.seed, request.step, query, noise) for query in queries]
        # neither order nor number of the points depends on the queries at once, so a step log can be replayed with any number
        points = [Point(z, sign * eps) for z in directions for sign in (1, -1)]
        highs, lows = request.loss.at(points).view(-1, 2).T.tolist()
        plus += highs
        minus += lows
        for z, high, low in zip(directions, highs, lows, strict=True):
            tuned.accumulate(gradient, z, (high - low) / (2 * eps) / request.num_queries, (eps, -eps))
        del directions, points, z  # freed before the next ones are drawn
    mean_plus, mean_minus = sum(plus) / len(plus), sum(minus) / len(minus)
    return Estimate(
        loss=(mean_plus + mean_minus) / 2,
        loss_plus=mean_plus,
        loss_minus=mean_minus,
        projected_grad=tuple((high - low) / (2 * eps) for high, low in zip(plus, minus, strict=True)),
        num_evaluations=2 * len(plus),
        gradient=gradient,
    )


def one_sided(request: Request, noise: Noise) -> tuple[Estimate, list[float]]:
    """Return the mean over the queries of ``(L(w + eps z) - L(w)) / eps z``, and the losses at ``w + eps z``."""
    tuned, eps = request.tuned, request.eps
    gradient: dict[str, Tensor] = {}
    base: float | None = None
    losses: list[float] = []
    for queries in request.queries_in_turn():
        directions = [tuned.draw(request.seed, request.step, query, noise) for query in queries]
        points = [Point(z, eps) for z in directions]
        if base is None:
            base, *highs = request.loss.at([Point({}, 0.0), *points]).tolist()
        else:
            highs = request.loss.at(points).tolist()
        losses += highs
        for z, loss in zip(directions, highs, strict=True):
            tuned.accumulate(gradient, z, (loss - base) / eps / request.num_queries, (eps, 0.0))
        del directions, points, z  # freed before the next ones are drawn
    assert base is not None
    estimate = Estimate(
        loss=base,
        loss_plus=sum(losses) / len(losses),
        loss_minus=base,
        projected_grad=tuple((loss - base) / eps for loss in losses),
        num_evaluations=1 + len(losses),
        gradient=gradient,
    )
    return estimate, losses
