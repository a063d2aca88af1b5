"""The change of a held-out score, with its standard error, in figures and in a sentence."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

# A change of the dev loss below this share of it is no change; a sweep of learning rates uses the same share.
_MIN_PROGRESS = 0.005
_SHARES = ("accuracy", "exact_match")


@dataclass(frozen=True)
class ScoreChange:
    """A held-out score before and after training.

    Attributes:
        metric: Its name.
        before: Score before.
        after: Score after.
        standard_error: Of ``after - before``; ``None`` where it cannot be had (see :func:`score_change`).
        paired: Whether it is that of the mean difference of the same rows, else that of two independent shares.
        lower_is_better: Whether less of the metric is better.
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
        """Whether the change is larger than its standard error (or, without one, is any)."""
        error = 0.0 if self.standard_error is None else self.standard_error * (1 + 1e-6)  # one row more is exactly one
        return abs(self.change) > error

    def figures(self) -> str:
        """The change with its standard error."""
        if self.standard_error is None:
            return f"{self.change:+.4f}"
        kind = "paired" if self.paired else "unpaired"
        return f"{self.change:+.4f}, {kind} standard error {self.standard_error:.4f}"

    def sentence(self) -> str:
        """What happened to the score."""
        moved = f"from {self.before:.4f} to {self.after:.4f} ({self.figures()})"
        if self.change == 0:
            return f"The held-out {self.metric} did not change: {self.after:.4f} before and after"
        verb = "fell" if self.change < 0 else "rose"
        noise = "" if self.shown else ", which is within its standard error"
        return f"The held-out {self.metric} {verb} {moved}{noise}"


def score_change(
    metric: str,
    scores: tuple[float, float],
    rows: tuple[Mapping[str, float] | None, Mapping[str, float] | None],
    num_rows: int,
    lower_is_better: bool = False,
) -> ScoreChange:
    """Compare the scores before and after.

    With the same rows scored both times the standard error is that of the mean of their differences, s / sqrt(n) with the
    sample standard deviation s. With other rows it is that of the difference of two
    independent shares, sqrt((p (1 - p) + q (1 - q)) / n), for metrics that are shares of rows; else there is none.

    Args:
        metric: Its name.
        scores: Before and after.
        rows: What each row scored, by its id, before and after; see :func:`slzo.evaluation.metrics.row_score`.
        num_rows: Rows that were scored after training.
        lower_is_better: Whether less of the metric is better.
    """
    before, after = scores
    first, second = rows
    if first and second and first.keys() == second.keys() and len(first) > 1:
        differences = [second[name] - first[name] for name in second]
        # rows of which a metric is no mean, or with ids that are not unique, would give another change
        if math.isclose(
            statistics.fmean(differences), after - before, abs_tol=1e-4 * max(1.0, abs(before), abs(after))
        ):
            error = statistics.stdev(differences) / math.sqrt(len(differences))
            return ScoreChange(metric, before, after, error, True, lower_is_better)
    if metric in _SHARES and num_rows > 0:
        error = math.sqrt((before * (1 - before) + after * (1 - after)) / num_rows)
        return ScoreChange(metric, before, after, error, False, lower_is_better)
    return ScoreChange(metric, before, after, None, False, lower_is_better)


@dataclass(frozen=True)
class DevLoss:
    """The dev loss of a run, by its first, best and last validation.

    Attributes:
        first: Step and loss.
        best: Step and loss.
        last: Step and loss.
        description: Name of it; for a reward its distance to the best one takes the place of the loss.
    """

    first: tuple[int, float]
    best: tuple[int, float]
    last: tuple[int, float]
    description: str = "dev loss"

    @property
    def rose(self) -> bool:
        """Whether it is higher at the end than at the first validation, by as much as would be progress, or not finite."""
        return not math.isfinite(self.last[1]) or self.last[1] > (1 + _MIN_PROGRESS) * self.first[1]

    @property
    def fell(self) -> bool:
        """Whether the best is lower than the first by enough to be progress."""
        return self.best[1] < (1 - _MIN_PROGRESS) * self.first[1]

    def sentence(self) -> str:
        """Said where it rose."""
        if not math.isfinite(self.last[1]):
            return f"The {self.description} was not finite at step {self.last[0]}"
        (step, loss), (last_step, last_loss) = self.first, self.last
        return f"The {self.description} rose from {loss:.4f} at step {step} to {last_loss:.4f} at step {last_step}"


def dev_loss(validations: Sequence[Mapping[str, Any]], description: str = "dev loss") -> DevLoss | None:
    """The dev loss of this process's validations, an infinite one being ``None`` there; ``None`` for fewer than two."""
    if len(validations) < 2:
        return None
    found = [(int(v["step"]), math.inf if v["loss"] is None else float(v["loss"])) for v in validations]
    return DevLoss(found[0], min(found, key=lambda pair: pair[1]), found[-1], description)


def verdict(change: ScoreChange | None, losses: DevLoss | None) -> str | None:
    """What became of score and dev loss, in plain sentences; ``None`` where nothing is known."""
    said = [] if change is None else [change.sentence()]
    if losses is not None and losses.rose:
        said.append(losses.sentence())
    return ". ".join(said) + "." if said else None


def is_doubtful(change: ScoreChange | None, losses: DevLoss | None) -> bool:
    """Whether the run did not do what it was for, as far as its figures show."""
    return (change is not None and (change.worse or not change.shown)) or (losses is not None and losses.rose)
