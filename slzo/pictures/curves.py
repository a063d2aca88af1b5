"""Loss, score, time and memory of one run or of several."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slzo.pictures.style import lines, picture, tidy

_MOST_POINTS = 300


@dataclass(frozen=True)
class CurvePoint:
    """What is known after some steps.

    Attributes:
        step: Steps taken.
        seconds: Training seconds, validations included; ``None``: not known.
        loss: Dev loss; ``None``: not finite.
        score: The task's metric on the dev rows; ``None``: not known.
        memory_gb: Largest memory so far, GiB; ``None``: not known.
    """

    step: int
    seconds: float | None = None
    loss: float | None = None
    score: float | None = None
    memory_gb: float | None = None


@dataclass(frozen=True)
class HeldOut:
    """A score of the held-out rows.

    Attributes:
        step: Steps that the scored weights had taken.
        value: The task's metric.
        standard_error: Over the rows; ``None``: not known.
    """

    step: int
    value: float
    standard_error: float | None = None


@dataclass(frozen=True)
class RunCurves:
    """The curves of a run.

    Attributes:
        name: What the run is called.
        metric: The task's metric.
        points: One a validation, by step.
        train: Step and training loss.
        before: The held-out score before training.
        after: That of the checkpoint that was kept.
    """

    name: str
    metric: str
    points: Sequence[CurvePoint] = ()
    train: Sequence[tuple[int, float]] = ()
    before: HeldOut | None = None
    after: HeldOut | None = None


def curves_picture(runs: Sequence[RunCurves], title: str = "") -> Figure:
    """Four panels over the steps: loss, score with the held-out points before and after, seconds, memory."""
    figure = picture(9, 6, title)
    (loss, score), (time, memory) = figure.subplots(2, 2)
    alone = len(runs) == 1
    for run, (colour, dashes) in zip(runs, lines(len(runs)), strict=True):
        steps, means = _thinned(run.train)
        loss.plot(steps, means, color=colour, alpha=0.35, linewidth=0.9, label="training rows" if alone else None)
        label = "dev rows" if alone else run.name
        _line(loss, run, lambda point: point.loss, color=colour, linestyle=dashes, label=label)
        _line(score, run, lambda point: point.score, color=colour, linestyle=dashes, label=label)
        _held_out(score, run, colour, alone)
        _line(time, run, lambda point: point.seconds, color=colour, linestyle=dashes)
        _line(memory, run, lambda point: point.memory_gb, color=colour, linestyle=dashes)
    metrics = sorted({run.metric for run in runs})
    for axis, label in ((loss, "loss"), (score, " / ".join(metrics)), (time, "seconds"), (memory, "peak memory, GiB")):
        tidy(axis, "step", label)
    for axis in (time, memory):
        axis.set_ylim(0, 1.08 * axis.get_ylim()[1])
    for axis in (loss, score, time, memory):
        axis.set_xlim(left=-0.02 * axis.get_xlim()[1])
    for axis in (loss, score):
        if axis.get_legend_handles_labels()[1]:
            axis.legend(fontsize=8, frameon=False)
    return figure


def _line(axis: Axes, run: RunCurves, value: Callable[[CurvePoint], float | None], **style: Any) -> None:
    found = [(point.step, own) for point in run.points if (own := value(point)) is not None]
    if found:
        axis.plot(*zip(*found, strict=True), marker="o", markersize=3, linewidth=1.3, **style)


def _held_out(axis: Axes, run: RunCurves, colour: str, alone: bool) -> None:
    for when, held, marker in (("before", run.before, "s"), ("after", run.after, "D")):
        if held is not None:
            label = f"held-out rows {when}: {held.value:.4g}" if alone else None
            error = held.standard_error
            axis.errorbar(
                held.step, held.value, error, fmt=marker, color=colour, mec="black", capsize=4, label=label, zorder=3
            )


def _thinned(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """Means of neighbours where there are more points than a picture shows."""
    size = -(-len(points) // _MOST_POINTS) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [group[-1][0] for group in groups], [fmean(loss for _, loss in group) for group in groups]
