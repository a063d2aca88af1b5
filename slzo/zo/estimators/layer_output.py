"""The gradient at the tuned layer's output from forward passes, and from there by the derivative of this one layer."""

import math

import torch
from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.zo.estimators.base import Estimate, Estimator, LayerOutput, Positions, Request, estimate_from_gradient
from slzo.zo.noise import row_noise

# SmolLM2-135M, layer 28: 64 queries did not lower the dev loss of SST-2 more than 16 at equal steps. With likely tokens of the
# vocabulary 16 are at least as good as 4 in equal time (COPA). If logits of all tokens are needed, a query costs more than the
# rest of the step, so fewer are better, and one if each answer token has a loss of its own.
_QUERIES, _QUERIES_WIDE, _QUERIES_PER_TOKEN = 16, 4, 1


class LayerOutputPerturbation(Estimator):
    r"""Perturbs the output of the tuned layer instead of its weights (node perturbation: Fiete and Seung 2006, arXiv 2210.03310).

    Let h be the output of the layer and :math:`l_i` what row i adds to the loss. In query k each row gets its own Gaussian noise
    :math:`d_{ik}`, and

    .. math:: \hat g_i = \frac{1}{q} \sum_k \frac{l_i(h + c \, d_{ik}) - l_i(h - c \, d_{ik})}{2 c} \, d_{ik}

    estimates :math:`\partial l_i / \partial h` with a bias of order :math:`c^2`. The tuned tensors get :math:`J^T \hat g`; J is
    the derivative of h with respect to them. Everything above the layer only runs forward. The layer itself is differentiated
    by autograd.

    With positions "answer" only the positions that predict an answer token get noise. The result estimates the gradient with h
    constant at all other positions. The states of the other tokens are then the same at all points, so the layers above run over
    them only once a step. In the last layer this is the whole gradient, since the loss depends on no other output there.

    If the loss is also a sum over answer tokens (AnswerLikelihood), :math:`l_i` is the loss of token i, so each position is
    measured by the token that it predicts. This leaves out what a position does to later tokens through attention, which is
    nothing in the last layer, and it removes their noise.

    If the loss needs the likelihood of tokens, the logits of the whole vocabulary are computed once a step, and at each point
    only those of the 1,024 tokens that are likeliest in the row; the others count as constant
    (:class:`slzo.zo.likely_tokens.LikelyTokens`).

    Args:
        queries: Noise vectors per row and step, >= 1. Left out, 16; for an objective that reads all logits itself 4, and 1 if it
            is then a sum over answer tokens. Each costs two passes of the perturbed tokens through the layers above and the head.
        scale: c as a share of the root mean square of what the layer adds to the perturbed token, > 0.
        positions: Positions that get noise, answer or all.

    Raises:
        SlzoError: An argument is out of range.
    """

    along_directions = False
    perturbs_output = True

    def __init__(self, queries: int | None = None, scale: float = 0.05, positions: Positions = "answer") -> None:
        if queries is not None and queries < 1:
            raise SlzoError(f"model.estimator.queries {queries}: must be at least 1")
        if not 0 < scale < math.inf:
            raise SlzoError(f"model.estimator.scale {scale}: must be a number above 0; 0.05 is usual")
        if positions not in ("answer", "all"):
            raise SlzoError(f"model.estimator.positions {positions!r}: choose one of answer, all")
        self.queries, self.scale, self.positions = queries, scale, positions

    def check(self, num_queries: int, batch_size: int | None = None) -> None:
        if num_queries != 1:
            raise SlzoError(
                f"model.num_queries {num_queries}: counts directions of weights, and LayerOutputPerturbation has none; set "
                "model.estimator.queries, or use model.estimator SPSA"
            )

    def estimate(self, request: Request) -> Estimate:
        def at_output(output: LayerOutput) -> Tensor:
            return self._at_output(output, request.seed, request.step)

        loss, gradient, evaluations = request.loss.gradient_from_output(at_output, self.positions)
        return estimate_from_gradient(loss, gradient, round(evaluations))

    def _at_output(self, output: LayerOutput, seed: int, step: int) -> Tensor:
        """Return the estimated gradient of the total loss with respect to the output, shape (P, width)."""
        size = self.scale * output.size
        gradient = torch.zeros(len(output.row), output.width, device=size.device)
        counts = torch.bincount(output.row, minlength=len(output.keys)).tolist()
        at_once = max(1, output.points_at_once // 2)
        num_queries = self._num_queries(output)
        for first in range(0, num_queries, at_once):
            queries = range(first, min(first + at_once, num_queries))
            shifts = size * torch.stack(
                [row_noise(output.keys, counts, gradient, seed, step, query) for query in queries]
            )
            points = torch.cat([shifts, -shifts])
            losses = torch.cat([output.losses(part) for part in points.split(output.points_at_once)])
            high, low = losses.chunk(2)
            up, down = output.applied(points).chunk(2)
            gradient += torch.einsum("np,npd->pd", (high - low)[:, output.part], up - down)
        return gradient / (4 * num_queries * size.square())

    def _num_queries(self, output: LayerOutput) -> int:
        if self.queries is not None:
            return self.queries
        if not output.whole_vocabulary:
            return _QUERIES
        return _QUERIES_PER_TOKEN if output.by_position else _QUERIES_WIDE

    def evaluations(self, num_queries: int) -> float:
        queries = _QUERIES if self.queries is None else self.queries
        # about: with noise at all positions each query is two passes; otherwise 16 queries cost about one
        return 1 + 2 * queries if self.positions == "all" else 1 + queries / _QUERIES

    def describe(self) -> str:
        return type(self).__name__ if self.queries is None else f"{type(self).__name__} ({self.queries} queries)"
