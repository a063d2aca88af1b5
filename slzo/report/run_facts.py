"""What a finished run reports of itself, in addition to its held-out scores."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from slzo.evaluation.bag_of_words import WordsReference
from slzo.evaluation.selection_metric import SelectionMetric


@dataclass(frozen=True)
class RunFacts:
    """Inputs of the summary and its advice, in addition to the held-out scores.

    Attributes:
        model: Name of the model.
        task: Name of the task.
        layer: Dominant layer; ``None`` if the scope needs none.
        layer_reason: Reason for the choice of the layer.
        num_layers: Number of decoder layers of the model.
        scope: Description of the scope.
        estimator: Description of the estimator.
        optimizer: Name of the optimizer.
        lr: Learning rate, a number or ``auto``.
        scheduled: Whether a scheduler changes the learning rate.
        lr_at_end: Learning rate after the last step.
        eps: Size of the perturbation.
        metric: The metric of the run.
        num_rows: Number of held-out rows.
        requested_rows: Requested number of held-out rows; ``None`` for all.
        steps: Number of steps taken.
        evaluations: Number of batch evaluations.
        skipped_steps: Number of steps without a finite loss.
        rollbacks: Number of returns to earlier weights.
        spikes: Number of steps with a loss far above the usual one, and the largest such loss.
        seconds: Duration of the whole command, in seconds.
        train_seconds: Seconds since the first step.
        validations: Step, evaluations, seconds and loss of each validation.
        planned_memory_gb: Estimated peak memory, GiB; ``None`` if it was not estimated.
        peak_memory_gb: Measured peak memory, GiB.
        tuned_parameters: Number of tuned parameters.
        total_parameters: Number of parameters of the model.
        seed: Seed of the directions.
        config: Config file in the run's folder; ``None`` if the run was not started from the command line.
        own_code: Whether the config runs code that did not come with slzo, so that commands must name it.
        trusts_code: Whether the model runs code from its repository.
        best: Checkpoint that was scored; ``None`` if there is none.
        last: Last checkpoint; ``None`` if there is none.
        limit: Option that ends the run, ``max_steps`` or ``max_epochs``, and its value.
        command: Command line that started the run; ``None`` for a run from Python.
        folder: Folder of the run; ``None`` if no files are written.
        majority_share: Share of the held-out rows in their most frequent class; ``None`` if they have no common classes.
        reference: A linear model's score on the held-out rows; ``None`` if it was not computed.
        first_order_gb: Peak memory of first order for the same tensors, GiB; ``None`` if it does not fit or is not possible.
    """

    model: str
    task: str
    layer: int | None
    layer_reason: str
    num_layers: int
    scope: str
    estimator: str
    optimizer: str
    lr: float | str
    scheduled: bool
    lr_at_end: float
    eps: float | None
    metric: SelectionMetric
    num_rows: int
    requested_rows: int | None
    steps: int
    evaluations: int
    skipped_steps: int
    rollbacks: int
    spikes: Mapping[str, Any]
    seconds: float
    train_seconds: float
    validations: Sequence[Mapping[str, Any]]
    planned_memory_gb: float | None
    peak_memory_gb: float
    tuned_parameters: int
    total_parameters: int
    seed: int
    config: str | None
    own_code: bool
    trusts_code: bool
    best: str | None
    last: str | None
    limit: tuple[str, int]
    command: str | None
    folder: str | None
    majority_share: float | None
    reference: WordsReference | None
    first_order_gb: float | None
