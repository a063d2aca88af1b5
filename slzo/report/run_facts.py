"""How a training ended, and what a finished run reports of itself in addition to its held-out scores."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from slzo.evaluation.bag_of_words import WordsReference
from slzo.evaluation.selection_metric import SelectionMetric
from slzo.report.history import History


@dataclass(frozen=True)
class FitOutcome:
    """Results of a training after its last step.

    Attributes:
        steps: Steps taken.
        lr: Learning rate at the end.
        best: Path of the best checkpoint; ``None`` if there is none.
        last: Path of the last checkpoint; ``None`` if there is none.
        history: The record of this run and of the runs that it continues.
        rollbacks: How often the run went back to earlier weights.
        limit: Option that ends the run, ``max_steps`` or ``max_epochs``, and its value.
        reference: Whether to compare with a bag of words.
    """

    steps: int
    lr: float
    best: str | None
    last: str | None
    history: History
    rollbacks: int
    limit: tuple[str, int]
    reference: bool


@dataclass(frozen=True)
class RunFacts:
    """Inputs of the summary and its advice, in addition to the held-out scores.

    Attributes:
        outcome: Results of the training.
        figures: Facts that ``summary.json`` repeats, by their names there; primitives only.
        processes: Number of processes.
        epochs: How often each training row was used, on average.
        layer: Dominant layer; ``None`` if the scope needs none.
        scheduled: Whether a scheduler changes the learning rate.
        metric: The metric of the run.
        num_rows: Number of held-out rows.
        requested_rows: Requested number of held-out rows; ``None`` for all.
        config: Config file in the run's folder; ``None`` if the run was not started from the command line.
        own_code: Whether the config runs code that did not come with slzo, so that commands must name it.
        trusts_code: Whether the model runs code from its repository.
        virtual_tokens: Whether virtual tokens are tuned, which ``slzo generate`` cannot use.
        folder: Folder of the run; ``None`` if no files are written.
        reference: A linear model's scores on the held-out rows.
        first_order_gb: Peak memory of first order for the same tensors, GiB; ``None`` if it does not fit or is not possible.
    """

    outcome: FitOutcome
    figures: Mapping[str, Any]
    processes: int
    epochs: float
    layer: int | None
    scheduled: bool
    metric: SelectionMetric
    num_rows: int
    requested_rows: int | None
    config: str | None
    own_code: bool
    trusts_code: bool
    virtual_tokens: bool
    folder: str | None
    reference: WordsReference
    first_order_gb: float | None
