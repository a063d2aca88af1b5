"""Results of a sweep: the figures of each layer, a verdict in words, a table and plots."""

import csv
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import torch

from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import SweepPlan
from slzo.plots.style import save
from slzo.plots.sweep import sweep_curves_plot, sweep_plot
from slzo.utils.files import replacing, write_json
from slzo.utils.pluralize import pluralize
from slzo.utils.sampling_error import plus_minus, standard_error
from slzo.zo.profile import LayerStatistics
from slzo.zo.selection.base import CLEAR, Choice, in_errors
from slzo.zo.trial import Score, Trial


@dataclass(frozen=True)
class LayerResult:
    """Figures of one layer: means over the seeds that did not diverge. What was not measured is ``None``.

    Attributes:
        layer: Decoder layer, counted from 0.
        sensitivity: Mean of |L+ - L-| / (2 eps) before training.
        sensitivity_se: Standard error of the sensitivity.
        outlier_ratio: Largest magnitude of the layer's output, divided by the median.
        seeds: Number of finished trainings.
        loss_before: Dev loss before training.
        loss: Dev loss after training; the lowest one if dev rows were scored on the way, since ``fit`` keeps the best weights.
        loss_se: Standard error of the loss over seeds.
        gain: ``loss_before - loss``.
        metric: Dev metric with the same weights.
        metric_se: Standard error of the metric over seeds.
        mean_abs_projected_grad: Mean magnitude of the projected gradients in training; with output perturbation and Backprop
            the mean norm of the gradient.
        seconds: Training time in seconds, without scoring.
        diverged: Number of trainings that diverged.
        dominant: Whether the profile's rule chose the layer.
    """

    layer: int
    sensitivity: float | None
    sensitivity_se: float | None
    outlier_ratio: float
    seeds: int
    loss_before: float | None
    loss: float | None
    loss_se: float | None
    gain: float | None
    metric: float | None
    metric_se: float | None
    mean_abs_projected_grad: float | None
    seconds: float | None
    diverged: int
    dominant: bool


@dataclass(frozen=True)
class SweepResult:
    """The results of a sweep.

    Attributes:
        rows: Figures of all layers.
        plan: Options of the sweep.
        curves: Dev scores during each training that did not diverge, by layer.
        chosen: What the layer is called that the profile or the user chose; empty if there is none.
        loss: What the loss is called.
    """

    rows: Sequence[LayerResult]
    plan: SweepPlan
    curves: Mapping[int, Sequence[Sequence[Score]]]
    chosen: str
    loss: str

    @classmethod
    def of(
        cls, store: CellStore, plan: SweepPlan, layers: Sequence[LayerStatistics], choice: Choice | None, loss: str
    ) -> Self:
        """Collect the results from finished cells, of all ``layers`` and the choice among them, if there is one."""
        dominant, title = (None, "") if choice is None else (choice.layer, choice.title)
        trials: dict[int, list[Trial]] = {}
        for layer, seed in plan.trainings:
            trials.setdefault(layer, []).append(Trial.from_dict(store.result(plan.training_cell(layer, seed))))
        curves = {layer: [trial.scores for trial in own if not trial.diverged] for layer, own in trials.items()}
        rows = []
        for measured in layers:
            found = store.result(plan.sensitivity_cell(measured.index)) if plan.directions else {}
            rows.append(_layer_result(measured, found, trials.get(measured.index, []), dominant))
        return cls(rows, plan, {layer: own for layer, own in curves.items() if own}, title, loss)

    @property
    def dominant(self) -> int | None:
        """The layer that the profile or the user chose; ``None`` if there is none."""
        return next((row.layer for row in self.rows if row.dominant), None)

    def verdict(self) -> str:
        """Return sentences that say whether the chosen layer wins, and how clearly.

        Layers of which a training diverged are left out. A sweep for a time compares curves too.
        """
        rows, loss = self.rows, self.loss
        trained = {row.layer: (row.loss, row.loss_se) for row in rows if row.loss is not None and not row.diverged}
        if not trained and any(row.diverged for row in rows):
            return "In every layer a training diverged: lower the learning rate (slzo sweep --lrs auto tries several)."
        if not trained:
            measured = {row.layer: (row.sensitivity or 0.0, row.sensitivity_se) for row in rows}
            if not any(value for value, _ in measured.values()):
                return "No direction changed the loss: give a larger model.eps. No layer was trained."
            return f"{self._compared('the highest sensitivity', measured, highest=True)} No layer was trained."
        unstable = ", ".join(str(row.layer) for row in rows if row.diverged)
        note = f" Layers with diverged trainings are left out: {unstable}." if unstable else ""
        gains = {row.layer: row.gain or 0.0 for row in rows if row.layer in trained}
        best = max(gains, key=gains.__getitem__)
        if gains[best] <= 0:
            how = f"raised it by {-gains[best]:.4g}" if gains[best] else "did not change it"
            return (
                f"No layer lowered the {loss}; the best, layer {best}, {how}. Try other learning rates (slzo sweep --lrs auto) "
                f"or more steps.{note}"
            )
        if self.plan.seconds is None:
            return f"{self._compared(f'the lowest {loss}', trained)}{note}"
        curves = {layer: self.curves[layer] for layer in trained}
        in_steps = self._at(curves, lambda score: score.step, self.plan.steps, "steps")
        return f"{in_steps} {self._at(curves, lambda score: score.seconds, self.plan.seconds, 's')}{note}"

    def _at(
        self, curves: Mapping[int, Sequence[Sequence[Score]]], place: Callable[[Score], float], length: float, unit: str
    ) -> str:
        """Return a sentence on the lowest loss that each layer has reached within the same steps or time."""
        losses = {
            layer: [_lowest([(place(score), score.loss) for score in curve], length) for curve in of_seeds]
            for layer, of_seeds in curves.items()
        }
        found = {layer: (statistics.fmean(of_seeds), standard_error(of_seeds)) for layer, of_seeds in losses.items()}
        return f"In {length:g} {unit}: {self._compared(f'the lowest {self.loss}', found)}"

    def _compared(self, what: str, found: Mapping[int, tuple[float, float | None]], highest: bool = False) -> str:
        """Return a sentence on the layer with the lowest or highest value, and how far the chosen or the next one is behind.

        Args:
            what: What the best layer has, such as ``the lowest dev loss``.
            found: Value and standard error of each layer; ``None`` as the standard error of a single seed.
            highest: Whether the best value is the highest one.
        """
        dominant = self.dominant
        best, *others = sorted(found, key=lambda layer: found[layer][0], reverse=highest)
        names = {
            layer: f"the {self.chosen}, {layer}," if layer == dominant else f"layer {layer}"
            for layer in (*found, dominant)
        }
        start = f"{names[best][0].upper()}{names[best][1:]} has {what}, {_measured(*found[best])}"
        if dominant is None:
            return f"{start}; the profile chooses no layer."
        if dominant not in found:
            return f"{start}; {names[dominant]} diverged or was not among those trained."
        if not others:
            return f"{start}; no other was compared."
        rival = others[0] if best == dominant else dominant
        (value, error), (behind, other_error) = found[best], found[rival]
        if value == behind:
            how_sure = "the same"
        elif error is None or other_error is None:
            how_sure = "from one seed, so without a standard error"
        else:
            errors = in_errors(abs(value - behind), math.hypot(error, other_error))
            how_sure = f"{errors:.1f} standard errors behind{'' if errors >= CLEAR else ', which may be noise'}"
        return f"{start}; {names[rival]} has {_measured(*found[rival])}, {how_sure}."

    def table(self) -> str:
        """Return the results as a table."""
        head = self.loss if len(self.loss) <= 10 else "distance"
        lines = [f"layer  sensitivity (se)      outlier ratio  {head:>10s}    metric    |gradient|"]
        for row in self.rows:
            trained = "         -         -             -"
            if row.loss is not None:
                trained = f"{row.loss:10.4f}{row.metric:10.4f}{row.mean_abs_projected_grad:14.4g}"
            elif row.diverged:
                trained = "  diverged         -             -"
            mark = f"  {row.diverged} of {row.seeds} diverged" if row.diverged and row.loss is not None else ""
            mark += "  <- dominant" if row.dominant else ""
            sensitivity = "-".rjust(11)
            if row.sensitivity is not None:
                sensitivity = f"{row.sensitivity:11.4g} ({row.sensitivity_se:.2g})"
            lines.append(f"{row.layer:5d}{sensitivity}{row.outlier_ratio:17.4g}  {trained}{mark}")
        return "\n".join(lines)

    def write(self, folder: Path, settings: dict[str, Any], title: str) -> None:
        """Write sweep.csv, sweep.json and the plots with ``title``, as .png and .svg."""
        plan, rows = self.plan, [asdict(row) for row in self.rows]
        with replacing(folder / "sweep.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, [field.name for field in fields(LayerResult)])
            writer.writeheader()
            # NaN is not equal to itself
            writer.writerows({name: "" if value != value else value for name, value in row.items()} for row in rows)
        curves = {layer: [asdict(score) for score in scores] for layer, scores in layer_curves(self.curves).items()}
        content = {
            "verdict": self.verdict(),
            "loss": self.loss,
            "plan": asdict(plan),
            "settings": settings,
            "torch": str(torch.__version__),
            "layers": rows,
            "curves": curves,
        }
        write_json(folder / "sweep.json", content)
        seeds = f"{pluralize(len(plan.seeds), 'seed')}, bars: standard errors"
        below = (
            f"{pluralize(plan.steps, 'step')}, {seeds}" if plan.trainings else "before training, bars: standard errors"
        )
        save(sweep_plot(rows, title, below, self.loss), folder, "sweep")
        if plan.seconds is not None and curves:
            save(sweep_curves_plot(curves, title, self.dominant, self.loss), folder, "sweep_curves")


def _layer_result(
    measured: LayerStatistics, sensitivity: Mapping[str, float], trials: Sequence[Trial], dominant: int | None
) -> LayerResult:
    good = [trial for trial in trials if not trial.diverged]
    loss = [trial.lowest.loss for trial in good]
    metric = [trial.lowest.metric for trial in good]
    return LayerResult(
        layer=measured.index,
        sensitivity=sensitivity.get("mean"),
        sensitivity_se=sensitivity.get("standard_error"),
        outlier_ratio=measured.ratio,
        seeds=len(trials),
        loss_before=trials[0].scores[0].loss if trials else None,
        loss=_mean(loss),
        loss_se=standard_error(loss),
        gain=_mean([trial.scores[0].loss - trial.lowest.loss for trial in good]),
        metric=_mean(metric),
        metric_se=standard_error(metric),
        mean_abs_projected_grad=_mean([trial.mean_abs_slope for trial in good]),
        seconds=_mean([trial.scores[-1].seconds for trial in good]),
        diverged=len(trials) - len(good),
        dominant=measured.index == dominant,
    )


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def _measured(value: float, error: float | None) -> str:
    return f"{value:.4g}{plus_minus(error, '.2g')}"


def layer_curves(curves: Mapping[int, Sequence[Sequence[Score]]]) -> dict[int, list[Score]]:
    """Return each layer's curve, the mean over its seeds at the steps at which all were scored, and at the end.

    The last scores of the seeds may be of different steps.
    """
    means = {}
    for layer, good in curves.items():
        by_step = [{score.step: score for score in scores} for scores in good]
        shared = [[own[step] for own in by_step] for step in sorted(set(by_step[0]).intersection(*by_step))]
        last = [scores[-1] for scores in good]
        means[layer] = [_mean_score(scores) for scores in ([*shared, last] if last not in shared else shared)]
    return means


def _mean_score(scores: Sequence[Score]) -> Score:
    step, evaluations, seconds, loss, metric = (
        statistics.fmean(values) for values in zip(*map(astuple, scores), strict=True)
    )
    return Score(round(step), round(evaluations), seconds, loss, metric)


def _lowest(points: Sequence[tuple[float, float]], place: float) -> float:
    """Return the lowest loss until a place, linear between two scores; beyond the last score, the lowest of all."""
    lowest = math.inf
    for (left, low), (right, high) in pairwise(points):
        if left >= place:
            break
        reached = high if right <= place else low + (high - low) * (place - left) / (right - left)
        lowest = min(lowest, reached)
    return lowest
