"""The output of the tuned layer, as an estimator perturbs it."""

from abc import ABC, abstractmethod
from collections.abc import Callable

from torch import Tensor


class LayerOutput(ABC):
    """What the tuned layer computes for some rows of a batch, at the P positions that predict an answer token.

    Attributes:
        keys: Number of each row in the training set, length B. It does not depend on the batch or the process.
        counts: Number of positions of each row, length B. They sum to P.
        term: Index of the term of the loss from which the slope of each position is read, shape (P,), int64. There is one term
            for each row (M = B) or, if the loss is a sum over positions, one for each position (M = P).
        per_token: Whether each position has a term of its own.
        size: Root mean square of what the layer adds to its input at each position, shape (P, 1), float32, > 0.
        width: Size of a hidden state.
        num_layers_above: Number of layers above the tuned one.
        compares_candidates: Whether the loss is one of the scores of candidates, all of which are computed at each point.
        whole_vocabulary: Whether each point needs logits of the whole vocabulary, which cost more than a layer.
        points_at_once: Number of points that :meth:`losses` can evaluate in about the memory of one forward pass of the batch.
    """

    keys: tuple[int, ...]
    counts: tuple[int, ...]
    term: Tensor
    per_token: bool
    size: Tensor
    width: int
    num_layers_above: int
    compares_candidates: bool
    whole_vocabulary: bool
    points_at_once: int

    @property
    def num_terms(self) -> int:
        """Number of terms of the loss, M."""
        return sum(self.counts) if self.per_token else len(self.keys)

    @abstractmethod
    def losses(self, shifts: Tensor) -> Tensor:
        """Return the M terms of the total loss of the batch at N points, shape (N, M), float32.

        Args:
            shifts: What is added to the output, shape (N, P, width), float32.
        """

    def token_shifts(self, number: int, change: float) -> Tensor | None:
        """Return shifts that change the logits of the answers' tokens, and of the likeliest tokens of each position.

        Args:
            number: Number of likely tokens, if the loss needs the likelihood of tokens.
            change: By how much a difference of two logits changes, if the layers above pass the shift on unchanged.

        Returns:
            Shifts, shape (K, P, width), float32, orthogonal at each position, 0 where a position has fewer than K. ``None`` if
            they are not known, as by default.
        """
        return None

    @abstractmethod
    def applied(self, shifts: Tensor) -> Tensor:
        """Return by how much the output really changes, after rounding to the model's dtype; shape and dtype as ``shifts``."""


OutputEstimator = Callable[[LayerOutput], tuple[Tensor, int]]
"""Returns the gradient of the total loss with respect to a layer's output, shape (P, width), float32, and the number of points at
which the loss was evaluated for it."""


def rms(states: Tensor) -> Tensor:
    """Return the root mean square of each state, shape (P, 1), of states of shape (P, width)."""
    return states.square().mean(dim=1, keepdim=True).sqrt()
