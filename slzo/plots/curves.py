"""Draw loss, score, time and memory of one run or several."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

from slzo.plots.style import lines, new_figure, plain, style_axis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_MOST_POINTS = 300


@dataclass(frozen=True)
class CurvePoint:
    """One validation of a run; values are ``None`` if they are unknown.

    Attributes:
        step: Number of steps taken.
        seconds: Training seconds, validations included.
        loss: Dev loss; ``None`` also if it is not finite.
        score: The task's metric on the dev rows.
        memory_gb: Peak memory so far, GiB.
    """

    step: int
    seconds: float | None
    loss: float | None
    score: float | None
    memory_gb: float | None


@dataclass(frozen=True)
class ScorePoint:
    """A score on the held-out rows.

    Attributes:
        step: Number of steps of the scored weights.
        value: The task's metric.
        standard_error: Standard error over the rows; ``None`` if it is unknown.
    """

    step: int
    value: float
    standard_error: float | None


@dataclass(frozen=True)
class RunCurves:
    """The curves of a run.

    Attributes:
        name: Name of the run.
        metric: Name of the task's metric.
        points: One point per validation, by step.
        train: Steps and training losses.
        before: The held-out score before training.
        after: The held-out score of the selected checkpoint.
    """

    name: str
    metric: str
    points: Sequence[CurvePoint] = ()
    train: Sequence[tuple[int, float]] = ()
    before: ScorePoint | None = None
    after: ScorePoint | None = None


def curves_plot(runs: Sequence[RunCurves], title: str = "") -> Figure:
    """Draw four panels over the steps: loss, score with the held-out scores before and after, seconds, and memory."""
    figure = new_figure(9, 6, title)
    (loss, score), (time, memory) = figure.subplots(2, 2)
    alone = len(runs) == 1
    for run, (colour, dashes) in zip(runs, lines(len(runs)), strict=True):
        steps, means = _thinned(run.train)
        loss.plot(steps, means, color=colour, alpha=0.35, linewidth=0.9, label="training rows" if alone else None)
        # matplotlib leaves a label that begins with _ out of the legend
        name = f"./{run.name}" if run.name.startswith("_") else run.name
        label = "dev rows" if alone else plain(name)
        _line(loss, run, lambda point: point.loss, color=colour, linestyle=dashes, label=label)
        _line(score, run, lambda point: point.score, color=colour, linestyle=dashes, label=label)
        _held_out(score, run, colour, alone)
        _line(time, run, lambda point: point.seconds, color=colour, linestyle=dashes)
        _line(memory, run, lambda point: point.memory_gb, color=colour, linestyle=dashes)
    metrics = sorted({run.metric for run in runs})
    for axis, label in ((loss, "loss"), (score, " / ".join(metrics)), (time, "seconds"), (memory, "peak memory, GiB")):
        style_axis(axis, "step", plain(label))
    for axis in (time, memory):
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    for axis in (loss, score, time, memory):
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])
    for axis in (loss, score):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False)
    return figure


def _line(axis: Axes, run: RunCurves, value: Callable[[CurvePoint], float | None], **style: Any) -> None:
    known = [(point.step, y) for point in run.points if (y := value(point)) is not None]
    if known:
        axis.plot(*zip(*known, strict=True), marker="o", markersize=3, linewidth=1.3, **style)


def _held_out(axis: Axes, run: RunCurves, colour: str, alone: bool) -> None:
    for when, held, marker in (("before", run.before, "s"), ("after", run.after, "D")):
        if held is not None:
            label = f"held-out rows {when}: {held.value:.4g}" if alone else None
            error = held.standard_error
            axis.errorbar(
                held.step, held.value, error, fmt=marker, color=colour, mec="black", capsize=4, label=label, zorder=3
            )


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Average neighbouring points if there are more than a plot can show."""
    size = -(-len(points) // _MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [fmean(loss for _, loss in group) for group in groups]
