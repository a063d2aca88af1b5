"""The gradient at the tuned layer's output from forward passes, and from there by the derivative of this one layer."""

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import normalize

from slzo.utils.argument_checks import check_at_least
from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, EstimatorContext, estimate_from_gradient
from slzo.zo.layer_output import LayerOutput, rms
from slzo.zo.noise import row_noise

_SCALE = 0.05
# Noise alone: 64 queries did not lower the dev loss of SST-2 more than 16 at equal steps (SmolLM2-135M, layer 28). The fewer
# layers are above, the more of the gradient the directions of tokens hold: on SST-2, 4 queries are as good as 16 at equal steps
# with one or two layers above (three models), and worse with 9 and 18. On whole answers 4 are no better in equal time. If logits
# of all tokens are needed, a query costs more than the rest of the step, so fewer are better, and one if each answer token has
# its own loss.
_QUERIES, _QUERIES_PER_LAYER, _QUERIES_WIDE, _QUERIES_PER_TOKEN = 16, 4, 4, 1
# With logits of all tokens a direction costs as much as a query, so fewer likely tokens are better.
_TOKENS, _TOKENS_WIDE = 8, 2
# A shift along the direction of a token changes a difference of logits by about this much.
_LOGIT_CHANGE = 0.3
# The weight of the noise is 0.5 |rest|^2 / |a|^2 |a_j| / rms(r), at most 0.3; see limit_noise.
_NOISE_SHARE, _NOISE_WEIGHT = 0.5, 0.3


class LayerOutputPerturbation(Estimator):
    r"""Perturbs the output of the tuned layer instead of its weights (node perturbation: Fiete and Seung 2006, arXiv 2210.03310).

    Let h be the output of the layer and :math:`l_i` what row i adds to the loss. In query k each row gets its own Gaussian noise
    :math:`d_{ik}`, and

    .. math:: \hat g_i = \frac{1}{q} \sum_k \frac{l_i(h + c \, d_{ik}) - l_i(h - c \, d_{ik})}{2 c} \, d_{ik}

    estimates :math:`\partial l_i / \partial h` with a bias of order :math:`c^2`. The tuned tensors get :math:`J^T \hat g`; J is
    the derivative of h with respect to them. Everything above the layer only runs forward. The layer itself is differentiated
    by autograd.

    Only the positions that predict an answer token get noise. The result estimates the gradient with h constant at all other
    positions. The states of the other tokens are then the same at all points, so the layers above run over them only once a
    step. In the last layer this is the whole gradient, since the loss depends on no other output there. If later layers take keys
    and values from the tuned one (layers 13 and 14 of Gemma 4 E2B), these are constant too.

    If the loss is also a sum over answer tokens (AnswerLikelihood), :math:`l_i` is the loss of token i, so each position is
    measured by the token that it predicts. This leaves out what a position does to later tokens through attention, which is
    nothing in the last layer, and it removes their noise. A loss of the scores of candidates with several tokens is such a sum to
    first order: the scores, times the derivative of the loss with respect to each (:meth:`LogitLoss.linearized`).

    The part of the gradient in which the logits of the answers' tokens change is measured along one direction at a time
    (:mod:`slzo.zo.head_directions`): all of it in the last layer, and half to three quarters of it near the end of the model. The
    directions come from the rows of the head, but what the loss does along them is measured by forward passes. Noise that is
    orthogonal to them measures the rest. Its error is larger than the gradient, so its weight is limited, see
    :func:`limit_noise`.

    If the loss needs the likelihood of tokens, the logits of the whole vocabulary are computed once a step, and at each point
    only those of the 1,024 tokens that are likeliest in the row; the others count as constant
    (:class:`slzo.zo.likely_tokens.LikelyTokens`).

    Args:
        queries: Noise vectors per row and step, >= 1. Each costs two passes of the perturbed tokens through the layers above and
            the head; by default 16. For candidates whose tokens' directions are measured 4 for each layer above, at least 4 and
            at most 16: near the end of the model these directions hold most of the gradient. For an objective that reads all
            logits itself 4, or 1 if it is also a sum over answer tokens.
        scale: c as a share of the root mean square of what the layer adds to the perturbed token, > 0.
        tokens: Likely tokens of each position whose directions are measured, >= 0; for candidates of one token theirs are,
            whatever the number. 0 for noise alone, whose mean is the gradient at these positions; by default 8, or 2 for
            an objective that reads all logits itself. With a quantized head there is noise alone.

    Raises:
        SlzoError: An argument is out of range.
    """

    perturbs = "output"

    def __init__(self, queries: int | None = None, scale: float = _SCALE, tokens: int | None = None) -> None:
        check_at_least("model.estimator.queries", queries)
        if not 0 < scale < math.inf:
            raise SlzoError(f"model.estimator.scale {scale}: must be a number above 0; 0.05 is usual")
        check_at_least("model.estimator.tokens", tokens, 0, "0 for noise alone")
        self.queries, self.scale, self.tokens = queries, scale, tokens

    def check(self, num_queries: int) -> None:
        if num_queries != 1:
            raise SlzoError(
                f"model.num_queries {num_queries}: counts directions of weights, and LayerOutputPerturbation has none; set "
                "model.estimator.queries, or use model.estimator SPSA"
            )

    def estimate(self, context: EstimatorContext) -> Estimate:
        at_output = partial(self._at_output, seed=context.seed, step=context.step)
        loss, gradient, evaluations = context.loss.gradient_from_output(at_output)
        return estimate_from_gradient(loss, gradient, evaluations)

    def _at_output(self, output: LayerOutput, seed: int, step: int) -> tuple[Tensor, int]:
        """Return the estimated gradient of the total loss with respect to the output, and the number of points."""
        size = self.scale * output.size
        gradient = torch.zeros(len(size), output.width, device=size.device)
        rest = torch.zeros_like(gradient)
        tokens = self.tokens
        if tokens is None:
            tokens = _TOKENS_WIDE if output.whole_vocabulary else _TOKENS
        shifts = output.token_shifts(tokens, _LOGIT_CHANGE) if tokens else None
        num_queries = _default_queries(output, shifts is not None) if self.queries is None else self.queries
        along = gradient.new_zeros(0, *gradient.shape) if shifts is None else shifts
        directions = normalize(along, dim=2)
        noise_of = partial(row_noise, output.keys, output.counts, seed=seed, step=step)
        at_once = max(1, output.points_at_once // 2)
        for first in range(0, len(along) + num_queries, at_once):
            last = min(first + at_once, len(along) + num_queries)
            of_directions, of_queries = range(first, min(last, len(along))), range(max(first, len(along)), last)
            # independent signs tell the positions of a row apart
            signs = [noise_of(size, query=-1 - number).sign() for number in of_directions]
            noise = [noise_of(gradient, query=number - len(along)) for number in of_queries]
            own = [along[first : first + len(signs)] * torch.stack(signs)] if signs else []
            own += [size * _orthogonal(torch.stack(noise), directions)] if noise else []
            change, applied = self._changes(output, torch.cat(own))
            (change_along, change_noise), (moved_along, moved_noise) = (
                each.split([len(of_directions), len(of_queries)]) for each in (change, applied)
            )
            length = moved_along.norm(dim=2, keepdim=True)
            # a position with fewer directions than others is not moved, but the loss of its row changes
            slope = torch.where(length > 0, change_along[..., None] / length, 0)
            gradient += (slope * normalize(moved_along, dim=2)).sum(dim=0)
            rest += torch.einsum("np,npd->pd", change_noise, moved_noise)
        rest /= num_queries * size.square()
        estimated = rest if shifts is None else gradient + limit_noise(rest, gradient, num_queries)
        return estimated, 2 * (len(along) + num_queries)

    @staticmethod
    def _changes(output: LayerOutput, shifts: Tensor) -> tuple[Tensor, Tensor]:
        """Return central differences: half of the change from ``-shifts`` to ``shifts``, shape (N, P, width).

        Those of the loss term that measures each position, shape (N, P), and of the output, shape (N, P, width).
        """
        points = torch.cat([shifts, -shifts])
        losses = torch.cat([output.losses(some) for some in points.split(output.points_at_once)])
        (high, low), (up, down) = losses.chunk(2), output.applied(points).chunk(2)
        return (high - low)[:, output.term] / 2, (up - down) / 2

    def evaluations(self, num_queries: int) -> float:
        # about: 16 queries cost about one pass, and the default near the end of the model less
        return 1 + (_QUERIES if self.queries is None else self.queries) / _QUERIES

    def describe(self) -> str:
        given = {"queries": self.queries, "scale": None if self.scale == _SCALE else self.scale, "tokens": self.tokens}
        words = [f"{name} {value}" for name, value in given.items() if value is not None]
        return f"{type(self).__name__} ({', '.join(words)})" if words else type(self).__name__


def _default_queries(output: LayerOutput, has_directions: bool) -> int:
    if output.whole_vocabulary:
        return _QUERIES_PER_TOKEN if output.per_token else _QUERIES_WIDE
    if has_directions and output.compares_candidates:
        return min(_QUERIES, _QUERIES_PER_LAYER * max(1, output.num_layers_above))
    return _QUERIES


def limit_noise(rest: Tensor, along: Tensor, num_queries: int) -> Tensor:
    r"""Limit what noise measured outside of the directions by what was measured along them.

    The noise is about equally large in all channels of a position, and with few queries it is much longer than the gradient g
    that it measures: with q queries in d dimensions the mean of its square is :math:`|g|^2 (d + q + 1) / q`. So :math:`|g|` is
    known on average, if the position has a loss of its own or is the only one of its row; otherwise it is overestimated. In
    channel j of a position, with a what the directions measured, the noise r gets the weight

    .. math:: \min\Big(0.3, \; \frac{|g|^2}{2 |a|^2} \, \frac{|a_j|}{\mathrm{rms}(r)}\Big)

    or 0.3 if the directions measured nothing. Adam divides each element by its own size, so in channels without a signal any
    small noise would move the weights as far.

    Args:
        rest: What noise measured, shape (P, width).
        along: What the directions measured, shape (P, width).
        num_queries: Noise vectors per position.
    """
    size = rms(rest)
    outside = size.square() * num_queries / (rest.shape[1] + num_queries + 1)
    weight = _NOISE_SHARE * outside / rms(along).square() * along.abs() / size
    return rest * weight.nan_to_num(_NOISE_WEIGHT).clamp(max=_NOISE_WEIGHT)


def _orthogonal(noise: Tensor, directions: Tensor) -> Tensor:
    """Return noise, shape (Q, P, width), without its part along orthonormal directions, shape (K, P, width)."""
    return noise - torch.einsum("qpk,kpd->qpd", torch.einsum("qpd,kpd->qpk", noise, directions), directions)
