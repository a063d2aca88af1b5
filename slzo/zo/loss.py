"""The loss of one batch as a function of the tuned tensors."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from torch import Tensor

from slzo.utils.errors import SlzoError
from slzo.zo.layer_output import OutputEstimator
from slzo.zo.tuned import Gradient, Point


@dataclass(frozen=True)
class LossReport:
    """Additional results of an evaluation of a loss.

    Attributes:
        values: Numbers to log, by name.
        problems: Failures, one line each. Not empty if the loss is not finite for a known reason.
    """

    values: Mapping[str, float] = field(default_factory=dict)
    problems: tuple[str, ...] = ()


class OutputGradient(NamedTuple):
    """Result of :meth:`Loss.gradient_from_output`.

    Attributes:
        loss: Loss at the masters.
        gradient: Gradient by name of the tuned tensor.
        evaluations: Cost as a number of forward passes of the batch through the tuned layer and all above. In the last layer of
            the model these run for the last tokens of each sequence only, see :mod:`slzo.models.logits`.
    """

    loss: float
    gradient: Gradient
    evaluations: float


class Loss(ABC):
    """The loss of one batch as a function of the masters, averaged over the rows of every process."""

    @abstractmethod
    def at(self, points: Sequence[Point]) -> Tensor:
        """Return the losses at P points, shape (P,), float32, from forward passes alone."""

    def gradient(self) -> tuple[float, Gradient]:
        """Return loss and gradient at the masters, by back-propagation. The live weights must equal the masters.

        Raises:
            SlzoError: The loss has no gradient. The base class always raises this.
        """
        raise SlzoError(f"model.estimator: {type(self).__name__} has no gradient; use SPSA")

    def gradient_from_output(self, estimate: OutputEstimator) -> OutputGradient:
        """Return the loss at the masters, and the gradient that follows from an estimate at the tuned layer's output.

        Only the tuned layer is differentiated. At positions that predict no answer token its output is treated as constant. The
        live weights must equal the masters.

        Args:
            estimate: Estimates the gradient at the output. It is called for each part of the batch that runs in one forward
                pass.

        Raises:
            SlzoError: The loss is not a sum over rows. The base class always raises this.
        """
        raise SlzoError(
            f"model.estimator: {type(self).__name__} is not a sum over rows of a loss of logits, so a layer's output cannot be "
            "perturbed; use SPSA"
        )
