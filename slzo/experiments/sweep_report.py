"""What a sweep found: the figures of each layer, in words, as a table and as a picture."""

import csv
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from matplotlib import colormaps
from matplotlib.figure import Figure

from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import SweepPlan, sensitivity_cell, training_cell
from slzo.experiments.trial import Score, Sensitivity, Trial
from slzo.files import replacing, write_json
from slzo.zo.profile import OutlierProfile


@dataclass(frozen=True)
class LayerResult:
    """One layer's figures; means over seeds, empty where the layer was not trained.

    Attributes:
        layer: Counted from 0.
        sensitivity: Mean of |L+ - L-| / (2 eps) before training.
        sensitivity_se: Its standard error.
        outlier_ratio: Largest over median magnitude of the layer's output.
        seeds: Trainings that were finished.
        loss_before: Dev loss before training.
        loss: Dev loss after it.
        loss_se: Its standard error over seeds.
        gain: ``loss_before - loss``.
        metric: Dev metric after it.
        metric_se: Its standard error over seeds.
        mean_abs_projected_grad: Mean magnitude of the projected gradients in training.
        seconds: Training seconds, the scoring left out.
        diverged: Trainings that diverged.
        dominant: Whether the profile's rule chose it.
    """

    layer: int
    sensitivity: float
    sensitivity_se: float
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


def layer_results(store: CellStore, plan: SweepPlan, profile: OutlierProfile) -> list[LayerResult]:
    """The figures of each layer, from finished cells."""
    rows = []
    for measured in profile.layers:
        layer = measured.index
        sensitivity = Sensitivity(**store.result(sensitivity_cell(layer)))
        names = [training_cell(*training) for training in plan.trainings if training[0] == layer]
        trials = [Trial.from_dict(store.result(name)) for name in names]
        good = [trial for trial in trials if not trial.diverged]
        loss = [trial.scores[-1].loss for trial in good]
        metric = [trial.scores[-1].metric for trial in good]
        rows.append(
            LayerResult(
                layer=layer,
                sensitivity=sensitivity.mean,
                sensitivity_se=sensitivity.standard_error,
                outlier_ratio=measured.ratio,
                seeds=len(trials),
                loss_before=trials[0].scores[0].loss if trials else None,
                loss=_mean(loss),
                loss_se=standard_error(loss),
                gain=_mean([trial.gain for trial in good]),
                metric=_mean(metric),
                metric_se=standard_error(metric),
                mean_abs_projected_grad=_mean([trial.mean_abs_slope for trial in good]),
                seconds=_mean([trial.scores[-1].seconds for trial in good]),
                diverged=len(trials) - len(good),
                dominant=layer == profile.dominant_layer,
            )
        )
    return rows


def _mean(values: Sequence[float]) -> float | None:
    return statistics.fmean(values) if values else None


def standard_error(values: Sequence[float]) -> float | None:
    """Standard error of a mean; ``None`` for fewer than two values."""
    return statistics.stdev(values) / math.sqrt(len(values)) if len(values) > 1 else None


def verdict(rows: Iterable[LayerResult], metric: str, chosen: str = "first outlier layer") -> str:
    """One sentence: does the layer that the profile chose, called ``chosen``, win, and by how much?"""
    rows = list(rows)
    dominant = next((row for row in rows if row.dominant), None)
    trained = sorted((row for row in rows if row.gain is not None), key=lambda row: -(row.gain or 0))
    if not trained and any(row.diverged for row in rows):
        return "Every training diverged: lower the learning rate (slzo lr_search tries several)."
    if not trained:
        order = sorted(rows, key=lambda row: -row.sensitivity)
        if dominant is None:
            return f"The profile chooses no layer; the most sensitive one is layer {order[0].layer}."
        place = order.index(dominant) + 1
        most = "the most sensitive"
        if place > 1:
            most = f"number {place} of {len(rows)} in sensitivity (layer {order[0].layer} leads)"
        return f"The {chosen}, {dominant.layer}, is {most}, at {dominant.sensitivity:.4g}; no layer was trained."
    best = trained[0]
    if (best.gain or 0) <= 0:
        return (
            f"No layer lowered the dev loss; the best, layer {best.layer}, raised it by {-(best.gain or 0):.4f}. Try other "
            "learning rates (slzo lr_search) or more steps."
        )
    if dominant is None:
        return f"Layer {best.layer} wins: it lowers the dev loss by {best.gain:.4f}; the profile chooses no layer."
    if dominant.gain is None:
        why = "diverged" if dominant.diverged else "was not trained beside it"
        return f"Layer {best.layer} wins: it lowers the dev loss by {best.gain:.4f}; the {chosen} {why}."
    if best is not dominant:
        behind = (best.gain or 0) - dominant.gain
        return (
            f"The {chosen}, {dominant.layer}, does not win: layer {best.layer} lowers the dev loss by "
            f"{best.gain:.4f}, {behind:.4f} more ({metric} {best.metric:.4f} against {dominant.metric:.4f})."
        )
    if len(trained) == 1:
        return f"The {chosen}, {dominant.layer}, lowers the dev loss by {dominant.gain:.4f}; no other was trained."
    second = trained[1]
    ahead = dominant.gain - (second.gain or 0)
    sure = ""
    if dominant.loss_se is not None and second.loss_se is not None:
        spread = math.hypot(dominant.loss_se, second.loss_se)
        sure = f", {ahead / spread:.1f} standard errors" if spread > 0 else ""
    return (
        f"The {chosen}, {dominant.layer}, wins: it lowers the dev loss by {dominant.gain:.4f}, {ahead:.4f} more than "
        f"the next best, layer {second.layer}{sure} ({metric} {dominant.metric:.4f} against {second.metric:.4f})."
    )


def format_rows(rows: Sequence[LayerResult]) -> str:
    """The rows as a table."""
    lines = ["layer  sensitivity (se)      outlier ratio    dev loss    metric  |proj. grad|"]
    for row in rows:
        trained = "         -         -             -"
        if row.loss is not None:
            trained = f"{row.loss:10.4f}{row.metric:10.4f}{row.mean_abs_projected_grad:14.4g}"
        elif row.diverged:
            trained = "  diverged         -             -"
        mark = "  <- dominant" if row.dominant else ""
        lines.append(
            f"{row.layer:5d}{row.sensitivity:11.4g} ({row.sensitivity_se:.2g}){row.outlier_ratio:17.4g}  {trained}{mark}"
        )
    return "\n".join(lines)


def write_sweep(
    folder: Path,
    rows: Sequence[LayerResult],
    plan: SweepPlan,
    settings: dict[str, Any],
    sentence: str,
    curves: Mapping[int, Sequence[Score]],
) -> None:
    """Write sweep.csv, sweep.json and sweep.png."""
    names = [field.name for field in fields(LayerResult)]
    with replacing(folder / "sweep.csv") as partial, partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in rows)
    content = {
        "verdict": sentence,
        "plan": asdict(plan),
        "settings": settings,
        "torch": torch.__version__,
        "layers": [asdict(row) for row in rows],
        "curves": {layer: [asdict(score) for score in scores] for layer, scores in curves.items()},
    }
    write_json(folder / "sweep.json", content)
    with replacing(folder / "sweep.png") as partial:
        sweep_figure(rows).savefig(partial, dpi=120)
    if plan.seconds is not None and curves:
        with replacing(folder / "sweep_curves.png") as partial:
            curves_figure(curves).savefig(partial, dpi=120)


def layer_curves(store: CellStore, plan: SweepPlan) -> dict[int, list[Score]]:
    """Dev scores on the way of each layer that was trained without diverging, and at the end.

    Means over seeds: at the steps at which all were scored, and of the last scores, which may be of different steps.
    """
    curves = {}
    for layer in plan.layers if plan.steps else ():
        names = [training_cell(*training) for training in plan.trainings if training[0] == layer]
        good = [trial.scores for trial in (Trial.from_dict(store.result(name)) for name in names) if not trial.diverged]
        if good:
            by_step = [{score.step: score for score in scores} for scores in good]
            shared = [[own[step] for own in by_step] for step in sorted(set(by_step[0]).intersection(*by_step))]
            last = [scores[-1] for scores in good]
            curves[layer] = [_mean_score(scores) for scores in ([*shared, last] if last not in shared else shared)]
    return curves


def _mean_score(scores: Sequence[Score]) -> Score:
    step, evaluations, seconds, loss, metric = (
        statistics.fmean(values) for values in zip(*map(astuple, scores), strict=True)
    )
    return Score(round(step), round(evaluations), seconds, loss, metric)


def curves_verdict(curves: Mapping[int, Sequence[Score]], plan: SweepPlan, chosen: int) -> str:
    """Two sentences: which layer is ahead after the same steps, and which after the same time?"""
    assert plan.seconds is not None
    at_steps = {
        layer: _interpolated([(score.step, score.loss) for score in curve], plan.steps)
        for layer, curve in curves.items()
    }
    at_time = {
        layer: _interpolated([(score.seconds, score.loss) for score in curve], plan.seconds)
        for layer, curve in curves.items()
    }
    return f"{_ahead(at_steps, f'{plan.steps} steps', chosen)} {_ahead(at_time, f'{plan.seconds:g} s', chosen)}"


def _ahead(losses: Mapping[int, float], after: str, chosen: int) -> str:
    best = min(losses, key=losses.__getitem__)
    own = "" if chosen not in losses or chosen == best else f", the chosen layer {chosen} at {losses[chosen]:.4f}"
    return f"After {after} layer {best} is ahead, at a dev loss of {losses[best]:.4f}{own}."


def _interpolated(points: Sequence[tuple[float, float]], place: float) -> float:
    """The loss between the scores before and after a place; the last one beyond it."""
    for (left, low), (right, high) in pairwise(points):
        if left <= place <= right:
            return low + (high - low) * (place - left) / max(right - left, 1e-9)
    return points[-1][1]


def curves_figure(curves: Mapping[int, Sequence[Score]]) -> Figure:
    """Dev loss of each trained layer over steps and over seconds."""
    figure = Figure(figsize=(11, 4.5), layout="constrained")
    axes = figure.subplots(1, 2, sharey=True)
    shades = colormaps["viridis"]
    for number, (layer, curve) in enumerate(sorted(curves.items())):
        color = shades(number / max(1, len(curves) - 1))
        losses = [score.loss for score in curve]
        axes[0].plot(
            [max(1, score.step) for score in curve], losses, "o-", color=color, label=f"layer {layer}", markersize=3
        )
        axes[1].plot([score.seconds for score in curve], losses, "o-", color=color, markersize=3)
    axes[0].set_xscale("log")
    axes[0].set_xlabel("steps")
    axes[1].set_xlabel("training seconds")
    axes[0].set_ylabel("dev loss")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
    axes[0].legend(fontsize=8, ncols=2)
    return figure


def sweep_figure(rows: Sequence[LayerResult]) -> Figure:
    """Sensitivity, outlier ratio and gain by layer, one above the other, the chosen layer marked."""
    figure = Figure(figsize=(8, 8), layout="constrained")
    axes = figure.subplots(3, sharex=True)
    layers = [row.layer for row in rows]
    axes[0].errorbar(
        layers, [row.sensitivity for row in rows], [row.sensitivity_se for row in rows], fmt="o-", capsize=3
    )
    axes[0].set_ylabel("sensitivity |L+ - L-| / (2 eps)")
    axes[1].semilogy(layers, [row.outlier_ratio for row in rows], "s-", color="tab:orange")
    axes[1].set_ylabel("outlier ratio max / median")
    trained = [row for row in rows if row.gain is not None]
    errors = [row.loss_se or 0.0 for row in trained]
    axes[2].bar([row.layer for row in trained], [row.gain or 0.0 for row in trained], yerr=errors, color="tab:green")
    axes[2].set_ylabel("gain: dev loss before - after")
    axes[2].set_xlabel("decoder layer (from 0)")
    for axis in axes:
        axis.grid(visible=True, alpha=0.3)
        for row in rows:
            if row.dominant:
                axis.axvline(row.layer, color="tab:red", linestyle="--", label=f"chosen layer {row.layer}")
    if any(row.dominant for row in rows):
        axes[0].legend()
    return figure
