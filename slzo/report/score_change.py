"""The change of a held-out score with its standard error, in figures and in a sentence."""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from slzo.evaluation.selection_metric import SelectionMetric
from slzo.utils.sampling_error import standard_error

if TYPE_CHECKING:  # it imports torch, which a report does not need
    from slzo.evaluation.held_out import HeldOutScores

MIN_PROGRESS = 0.005
"""A relative change of the dev loss below this is no progress; the learning-rate search uses the same bound."""

ERRORS = 2.0
"""A score rose or fell if it changed by more than this number of standard errors: about 95% confidence."""

PROPORTIONS = ("accuracy", "exact_match")
"""Metrics that are proportions of rows."""


@dataclass(frozen=True)
class ScoreChange:
    """A held-out score before and after training.

    Attributes:
        metric: Name of the metric.
        before: Score before training.
        after: Score after training.
        standard_error: Standard error of ``after - before``; ``None`` if unknown (see :func:`score_change`).
        paired: Whether it is the standard error of a mean difference over the same rows, not of independent proportions.
        lower_is_better: Whether smaller values of the metric are better.
    """

    metric: str
    before: float
    after: float
    standard_error: float | None
    paired: bool
    lower_is_better: bool = False

    @property
    def change(self) -> float:
        """After minus before."""
        return self.after - self.before

    @property
    def worse(self) -> bool:
        """Whether the score is worse than before."""
        return self.change > 0 if self.lower_is_better else self.change < 0

    @property
    def shown(self) -> bool:
        """Whether the change is larger than two standard errors or, without one, is not zero."""
        # allow for rounding
        error = 0.0 if self.standard_error is None else self.standard_error * (1 + 1e-6)
        return abs(self.change) > ERRORS * error

    def sentence(self) -> str:
        """Return a sentence on the change, without a full stop."""
        if self.change == 0:
            return f"The held-out {self.metric} did not change: {self.after:.4f} before and after"
        error, kind = self.standard_error, "paired" if self.paired else "unpaired"
        figures = f"{self.change:+.4f}" + ("" if error is None else f", {kind} standard error {error:.4f}")
        moved = f"from {self.before:.4f} to {self.after:.4f} ({figures})"
        if not self.shown:
            return f"The held-out {self.metric} went {moved}, which is within two standard errors: no change is shown"
        return f"The held-out {self.metric} {'fell' if self.change < 0 else 'rose'} {moved}"


def score_change(
    metric: SelectionMetric, before: HeldOutScores | None, after: HeldOutScores, num_rows: int
) -> ScoreChange | None:
    """Compare the scores of held-out rows before and after training.

    If the same rows were scored both times, the standard error is that of the mean of their differences, s / sqrt(n) with the
    sample standard deviation s. Otherwise, for metrics that are proportions of rows, it is that of the difference of two
    independent proportions, sqrt((p (1 - p) + q (1 - q)) / n). For other metrics there is none. ``num_rows`` is the number of
    rows that were scored after training.

    Returns:
        ``None`` if a score is missing or not finite, or if there is only one row: its change shows nothing.
    """
    name = metric.metric
    if num_rows < 2 or before is None or not math.isfinite(before.metrics.get(name, math.nan) + after.metrics[name]):
        return None
    old, new = before.metrics[name], after.metrics[name]
    error, paired = None, False
    if len(after.rows) > 1 and before.rows.keys() == after.rows.keys():
        differences = [after.rows[row] - before.rows[row] for row in after.rows]
        # the mean differs if the metric is not a mean over rows, or if ids are not unique
        if math.isclose(statistics.fmean(differences), new - old, abs_tol=1e-4 * max(1.0, abs(old), abs(new))):
            error, paired = standard_error(differences), True
    if not paired and name in PROPORTIONS:
        error = math.sqrt((old * (1 - old) + new * (1 - new)) / num_rows)
    return ScoreChange(name, old, new, error, paired, metric.lower_is_better)


def score_error(metric: str, score: float, rows: Mapping[str, float], num_rows: int) -> float | None:
    """Return the standard error of a held-out score.

    It is that of the mean over the rows, s / sqrt(n), which is sqrt(p (1 - p) / (n - 1)) for a proportion; ``None`` for other
    metrics without scores of rows, and for one row. ``rows`` has the score of each row by id, and is empty if it is unknown.
    """
    if len(rows) > 1 and math.isclose(statistics.fmean(rows.values()), score, abs_tol=1e-4 * max(1.0, abs(score))):
        return standard_error(list(rows.values()))
    if metric in PROPORTIONS and num_rows > 1 and 0 <= score <= 1:
        return math.sqrt(score * (1 - score) / (num_rows - 1))
    return None


@dataclass(frozen=True)
class DevLoss:
    """The dev loss of a run at its first, best and last validation.

    Attributes:
        first: Step and loss of the first validation.
        best: Step and loss of the validation with the lowest loss.
        last: Step and loss of the last validation.
        description: Name of the loss; for a reward, the loss is the distance to the best possible reward.
    """

    first: tuple[int, float]
    best: tuple[int, float]
    last: tuple[int, float]
    description: str

    @property
    def rose(self) -> bool:
        """Whether the last loss is above the first by more than ``MIN_PROGRESS``, or is not finite."""
        return not math.isfinite(self.last[1]) or self.last[1] > self.first[1] + MIN_PROGRESS * abs(self.first[1])

    @property
    def fell(self) -> bool:
        """Whether the best loss is below the first by more than ``MIN_PROGRESS``."""
        first = self.first[1]
        return self.best[1] < (first - MIN_PROGRESS * abs(first) if math.isfinite(first) else first)

    @property
    def unchanged(self) -> bool:
        """Whether the first, the best and the last loss are equal."""
        return self.first[1] == self.best[1] == self.last[1]

    @property
    def solved(self) -> bool:
        """Whether it was 0, the lowest possible, at all these validations."""
        return self.unchanged and self.last[1] == 0

    def sentence(self) -> str:
        """Return a sentence on a loss that rose or could not fall, without a full stop."""
        if self.solved:
            return f"The {self.description} was 0 at step {self.first[0]} already: nothing is left to learn"
        if not math.isfinite(self.last[1]):
            return f"The {self.description} was not finite at step {self.last[0]}"
        (step, loss), (last_step, last_loss) = self.first, self.last
        return f"The {self.description} rose from {loss:.4f} at step {step} to {last_loss:.4f} at step {last_step}"


def dev_loss(validations: Sequence[Mapping[str, Any]], description: str = "dev loss") -> DevLoss | None:
    """Return the dev loss of validations, in which ``None`` is infinite; ``None`` for fewer than two finite ones."""
    found = [(int(v["step"]), math.inf if v["loss"] is None else float(v["loss"])) for v in validations]
    if len(found) < 2 and all(math.isfinite(loss) for _, loss in found):
        return None
    return DevLoss(found[0], min(found, key=lambda pair: pair[1]), found[-1], description)


def verdict(change: ScoreChange | None, losses: DevLoss | None) -> str | None:
    """Return sentences on the change of the score and on a dev loss that did not fall; ``None`` if there is nothing to say."""
    sentences = [] if change is None else [change.sentence()]
    if losses is not None and (losses.rose or losses.solved):
        sentences.append(losses.sentence())
    return ". ".join(sentences) + "." if sentences else None


def is_doubtful(change: ScoreChange | None, losses: DevLoss | None) -> bool:
    """Whether no improvement is shown: the score is worse, or unchanged within two errors, or the loss rose or was always 0."""
    is_unshown = change is not None and (change.worse or not change.shown)
    return is_unshown or (losses is not None and (losses.rose or losses.solved))


def other_scores(summary: Mapping[str, Any]) -> str:
    """Return the metrics of a summary besides that of the run, before and after; empty if there are none."""
    before, after = summary.get("scores_before") or {}, summary.get("scores_after") or {}
    parts = []
    for name, score in after.items():
        if name != summary["metric"] and score is not None and math.isfinite(score):
            start = "" if before.get(name) is None else f"{before[name]:.4f} -> "
            parts.append(f"{name} {start}{score:.4f}")
    return ", ".join(parts)
