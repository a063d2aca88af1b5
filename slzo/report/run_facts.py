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
        figures: Facts that ``summary.json`` repeats, by their names there; primitives only.
        processes: Number of processes.
        layer: Dominant layer; ``None`` if the scope needs none.
        scheduled: Whether a scheduler changes the learning rate.
        metric: The metric of the run.
        num_rows: Number of held-out rows.
        requested_rows: Requested number of held-out rows; ``None`` for all.
        spikes: Number of steps with a loss far above the usual one, and the largest such loss.
        seconds: Duration of the whole command, in seconds.
        train_seconds: Seconds since the first step.
        validations: Step, evaluations, seconds and loss of each validation.
        config: Config file in the run's folder; ``None`` if the run was not started from the command line.
        own_code: Whether the config runs code that did not come with slzo, so that commands must name it.
        trusts_code: Whether the model runs code from its repository.
        virtual_tokens: Whether virtual tokens are tuned, which ``slzo generate`` cannot use.
        best: Checkpoint that was scored; ``None`` if there is none.
        last: Last checkpoint; ``None`` if there is none.
        limit: Option that ends the run, ``max_steps`` or ``max_epochs``, and its value.
        folder: Folder of the run; ``None`` if no files are written.
        reference: A linear model's score on the held-out rows; ``None`` if it was not computed.
        first_order_gb: Peak memory of first order for the same tensors, GiB; ``None`` if it does not fit or is not possible.
    """

    figures: Mapping[str, Any]
    processes: int
    layer: int | None
    scheduled: bool
    metric: SelectionMetric
    num_rows: int
    requested_rows: int | None
    spikes: Mapping[str, Any]
    seconds: float
    train_seconds: float
    validations: Sequence[Mapping[str, Any]]
    config: str | None
    own_code: bool
    trusts_code: bool
    virtual_tokens: bool
    best: str | None
    last: str | None
    limit: tuple[str, int]
    folder: str | None
    reference: WordsReference | None
    first_order_gb: float | None
