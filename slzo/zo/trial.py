"""Short trainings in single layers: their cost and their results."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from slzo.models.prefix_cache import PrefixCache
from slzo.zo.auto_step import AutoStep

OVERHEAD_LAYERS = 1.5
"""Cost of noise, update and head, as a number of layers. Fitted to steps of SPSA in four layers of SmolLM2-135M, within 8%."""


@dataclass(frozen=True)
class StepCost:
    """Cost of training in a layer. The unit is one row that runs through one layer.

    Attributes:
        num_layers: Decoder layers of the model.
        batch_size: Rows per step.
        evaluations: Evaluations of the batch per step.
        measuring: Evaluations that measure the step size before the first step.
        dev_rows: Rows per dev score.
        head_cost: Cost of logits over the whole vocabulary, as a number of layers.
        last_layer: Cost of the model's last layer, which runs for some tokens only, as a number of layers.
        measured: Layers whose step size is already known.
        caches: Whether the states that enter a layer are cached; a trial then computes its states from those of a lower layer.
    """

    num_layers: int
    batch_size: int
    evaluations: float
    measuring: float
    dev_rows: int
    head_cost: float = 0.0
    last_layer: float = 1.0
    measured: frozenset[int] = frozenset()
    caches: bool = True

    def layers(self, lowest: int) -> float:
        """Return the cost of one evaluation of a row if ``lowest`` is the first tuned layer."""
        below_last = self.num_layers - 1 - (lowest if self.caches else 0)
        return below_last + self.last_layer + OVERHEAD_LAYERS + self.head_cost

    def step(self, layer: int) -> float:
        """Return the cost of one step in a layer."""
        return self.evaluations * self.batch_size * self.layers(layer)

    def measure(self, layer: int) -> float:
        """Return the cost of measuring the step size in a layer."""
        return self.measuring * self.batch_size * self.layers(layer)

    def already_paid(self, layers: Iterable[int]) -> float:
        """Return the cost of measurements that were already made in some of the layers."""
        return sum(self.measure(layer) for layer in self.measured.intersection(layers))

    def training(self, layer: int, steps: int, num_train: int) -> float:
        """Return the cost of a training in a layer, including the states of each row below it, without dev scores."""
        states = min(num_train, steps * self.batch_size) * layer if self.caches else 0
        return steps * self.step(layer) + states


@dataclass(frozen=True)
class Score:
    """Score of the dev rows after some steps.

    Attributes:
        step: Steps so far.
        evaluations: Batch evaluations so far.
        seconds: Training time so far in seconds, without scoring.
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
    """Result of a short training.

    Attributes:
        scores: Dev scores before and after training; with a curve also those at steps 10, 20, 40 and so on.
        losses: Training loss of each step.
        mean_abs_slope: Mean magnitude of all projected gradients; mean norm of the gradients if no weights are perturbed.
        diverged: How the training diverged; empty if it did not.
    """

    scores: tuple[Score, ...]
    losses: tuple[float, ...]
    mean_abs_slope: float
    diverged: str

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Trial":
        """Create a trial from primitives, as ``asdict`` returns them."""
        # a file has null for what is not a number
        known: list[dict[str, Any]] = [
            {name: math.nan if value is None else value for name, value in each.items()} for each in data["scores"]
        ]
        scores = tuple(Score(**each) for each in known)
        return cls(**{**data, "scores": scores, "losses": tuple(data["losses"])})

    @property
    def lowest(self) -> Score:
        """The score with the lowest dev loss after the first step, whose weights ``fit`` would keep."""
        # NaN is not smaller than anything
        return min(self.scores[1:] or self.scores, key=lambda score: (math.isnan(score.loss), score.loss))

    @property
    def gain(self) -> float:
        """Decrease of the dev loss; minus infinity if the training diverged."""
        return -math.inf if self.diverged else self.scores[0].loss - self.scores[-1].loss


class Trials(Protocol):
    """Short trainings in single layers, which a selection rule may use to compare the layers.

    Each trial starts from the untuned model. All trials share the model, the rows and the cached states.

    Attributes:
        measures_rate: Whether the main training measures its learning rate. Then :meth:`step_size` shows how fast it starts.
        generates: Whether the loss needs generated answers, which makes trials slow.
        num_train: Number of training rows.
        num_dev: Number of dev rows.
    """

    measures_rate: bool
    generates: bool
    num_train: int
    num_dev: int

    def planned_steps(self, layer: int, share: float) -> int:
        """Return the number of steps of the main training in a layer.

        If trainer.max_time limits it, the number is measured.

        Args:
            layer: Decoder layer, counted from 0.
            share: Cost of the trials that come first, as a share of the main training. They use up the same time.
        """

    def cost(self, dev_rows: int) -> StepCost:
        """Return the cost of steps and scores, with at most ``dev_rows`` rows per score."""

    def step_size(self, layer: int) -> AutoStep:
        """Measure the step size in a layer. A later trial in this layer does not measure it again.

        Raises:
            SlzoError: The step size cannot be measured.
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
        """Train a layer, and score the dev rows before and after.

        Args:
            layer: Decoder layer, counted from 0. Train layers in rising order, so that they reuse the cached states.
            steps: Number of steps.
            dev_rows: Approximate number of dev rows to score; batches are not cut.
            num_batches: Repeat the first ``num_batches`` batches; ``None`` uses all batches.
            checks: Functions by step. After that step the dev rows are scored, and the trial stops if the function returns
                ``False`` for the score.

        Returns:
            The result, and the cached states that enter the layer, with which the main training can start.

        Raises:
            SlzoError: The layer cannot be trained.
        """
