"""Finite differences of the loss along random directions. The estimators use them."""

from torch import Tensor

from slzo.zo.estimators.base import Estimate, EstimatorContext
from slzo.zo.noise import Noise
from slzo.zo.tuned import UNPERTURBED, Point


def finite_differences(context: EstimatorContext, noise: Noise, two_sided: bool) -> tuple[Estimate, list[float]]:
    """Return the mean over the queries of z times the slope along z, and the losses at ``w + eps z``.

    The slope is ``(L(w + eps z) - L(w - eps z)) / (2 eps)`` if ``two_sided``, and ``(L(w + eps z) - L(w)) / eps`` otherwise. Then
    ``L(w)`` is evaluated once for all queries.
    """
    tuned, eps = context.tuned, context.eps
    low_end = -eps if two_sided else 0.0
    losses: list[float] = []
    slopes: list[float] = []
    gradient: dict[str, Tensor] = {}
    for queries in context.query_batches():
        directions = [tuned.draw(context.seed, context.step, query, noise) for query in queries]
        # neither order nor number of the points depends on the queries at once, so a step log can be replayed with any number
        points = [Point(z, end) for z in directions for end in ((eps, -eps) if two_sided else (eps,))]
        first = [] if two_sided or losses else [UNPERTURBED]
        losses += context.loss.at([*first, *points]).tolist()
        own = losses[-len(points) :]
        highs, lows = (own[::2], own[1::2]) if two_sided else (own, losses[:1] * len(own))
        for z, high, low in zip(directions, highs, lows, strict=True):
            slopes.append((high - low) / (eps - low_end))
            tuned.accumulate(gradient, z, slopes[-1] / context.num_queries, (eps, low_end))
        del directions, points, z  # freed before the next ones are drawn
    highs, lows = (losses[::2], losses[1::2]) if two_sided else (losses[1:], losses[:1])
    plus, minus = sum(highs) / len(highs), sum(lows) / len(lows)
    estimate = Estimate(
        loss=(plus + minus) / 2 if two_sided else minus,
        loss_plus=plus,
        loss_minus=minus,
        projected_grad=tuple(slopes),
        num_evaluations=len(losses),
        gradient=gradient,
    )
    return estimate, highs
