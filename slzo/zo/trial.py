"""What a short training reports."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from slzo.models.prefix_cache import PrefixCache
from slzo.zo.auto_step import AutoStep

OVERHEAD_LAYERS = 1.5
"""Cost of noise, update and head, as a number of layers: fitted to docs/results.md, within 3% of its seconds."""


@dataclass(frozen=True)
class StepCost:
    """Cost of training in one layer or another.

    Attributes:
        num_layers: Decoder layers of the model.
        batch_size: Rows of a step.
        evaluations: Evaluations of the batch in a step.
        measuring: Evaluations before the first step, where the step size is measured.
        dev_rows: Rows of a dev score.
        head_layers: Cost of whole-vocabulary logits, as a number of layers.
        measured: Layers whose step size is known already.
        caches: Whether states that enter a layer are kept.
        carries: Whether kept states are run on to the next layer instead of computed from the first one.
    """

    num_layers: int
    batch_size: int
    evaluations: float
    measuring: float = 0
    dev_rows: int = 0
    head_layers: float = 0.0
    measured: frozenset[int] = frozenset()
    caches: bool = True
    carries: bool = True

    def layers(self, lowest: int) -> float:
        """Layers that are run where ``lowest`` is tuned."""
        return self.num_layers - (lowest if self.caches else 0) + OVERHEAD_LAYERS + self.head_layers

    def step(self, layer: int) -> float:
        """One step in a layer."""
        return self.evaluations * self.batch_size * self.layers(layer)

    def measure(self, layer: int) -> float:
        """Measuring the step size in a layer."""
        return self.measuring * self.batch_size * self.layers(layer)

    def spared(self, layers: Iterable[int]) -> float:
        """Measuring that some layers do not need any more."""
        return sum(self.measure(layer) for layer in self.measured.intersection(layers))

    def training(self, layer: int, steps: int, num_train: int) -> float:
        """A training of so many steps in a layer, with the states of each row below it; without dev scores."""
        states = min(num_train, steps * self.batch_size) * layer if self.caches else 0
        return steps * self.step(layer) + states


@dataclass(frozen=True)
class Score:
    """Score of the dev rows after some steps.

    Attributes:
        step: Steps taken.
        evaluations: Batch evaluations spent on them.
        seconds: Training seconds spent on them, without scoring.
        loss: Dev loss.
        metric: The task's metric.
    """

    step: int
    evaluations: int
    seconds: float
    loss: float
    metric: float


@dataclass(frozen=True)
class Trial:
    """Outcome of a short training.

    Attributes:
        scores: Dev scores, the first before training, the last after it; with a curve also at steps 10, 20, 40 and so on.
        losses: Training loss of each step.
        mean_abs_slope: Mean magnitude of all projected gradients.
        diverged: How it diverged; empty if it did not.
    """

    scores: tuple[Score, ...]
    losses: tuple[float, ...]
    mean_abs_slope: float
    diverged: str

    def to_dict(self) -> dict[str, Any]:
        """Primitives only, for JSON."""
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Trial":
        """Inverse of :meth:`to_dict`."""
        scores = tuple(Score(**score) for score in data["scores"])
        return cls(**{**data, "scores": scores, "losses": tuple(data["losses"])})

    @property
    def gain(self) -> float:
        """Dev loss before training minus that after it; minus infinity if it diverged."""
        return -math.inf if self.diverged else self.scores[0].loss - self.scores[-1].loss


class Trials(Protocol):
    """Short trainings in single layers, each from the untuned model; what a selection rule may use to decide.

    All trials share model, rows and the states that enter the tuned layer.

    Attributes:
        steps: Steps of the training to come.
        measures_rate: Whether that training measures its learning rate, so that :meth:`step_size` tells how fast it begins.
        generates: Whether a loss takes generated answers, which makes trials slow.
        num_train: Training rows.
        num_dev: Dev rows.
    """

    steps: int
    measures_rate: bool
    generates: bool
    num_train: int
    num_dev: int

    def cost(self, dev_rows: int) -> StepCost:
        """Cost of steps and scores, with at most so many dev rows per score."""

    def step_size(self, layer: int) -> AutoStep:
        """The measured step size in a layer; a later trial there does not measure it again.

        Raises:
            SlzoError: It cannot be measured.
        """

    def train(
        self,
        layer: int,
        steps: int,
        *,
        dev_rows: int,
        num_batches: int | None = None,
        checks: Mapping[int, Callable[[Score], bool]] | None = None,
    ) -> tuple[Trial, PrefixCache | None]:
        """Train in a layer and score the dev rows before and after.

        Args:
            layer: Decoder layer, counted from 0. Layers in rising order reuse each other's states.
            steps: Steps to take.
            dev_rows: Score about so many dev rows, in whole batches.
            num_batches: Use the first so many batches again and again; ``None`` for all.
            checks: After so many steps the dev rows are scored, and the trial ends if the function returns ``False``.

        Returns:
            The outcome, and the states that enter the layer, which the training to come can start with.

        Raises:
            SlzoError: It cannot be trained.
        """
