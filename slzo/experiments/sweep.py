"""Tunes every decoder layer for the same steps and seeds: does the first outlier layer win?"""

import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch

from slzo.console import say
from slzo.errors import SlzoError
from slzo.experiments.store import CellStore
from slzo.experiments.trial import Sensitivity, Trial, Workbench
from slzo.plots import sweep_figure
from slzo.zo.profile import OutlierProfile
from slzo.zo.scopes.base import check_layer

MIN_DIRECTIONS = 20
_WAIT_SECONDS = 2.0


@dataclass(frozen=True)
class SweepPlan:
    """What a sweep does.

    Attributes:
        layers: Layers to train, rising; the sensitivity is measured in all layers of the model.
        steps: Steps of each training; 0 measures the sensitivity only.
        seeds: One training a layer for each.
        directions: Random directions for the sensitivity.
        num_rows: Training rows that the sensitivity is measured on.
    """

    layers: tuple[int, ...]
    steps: int
    seeds: tuple[int, ...]
    directions: int
    num_rows: int


@dataclass(frozen=True)
class SweepRow:
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


def plan_sweep(
    num_layers: int, layers: Sequence[int] | None, steps: int, seeds: Sequence[int], directions: int, num_rows: int
) -> SweepPlan:
    """Check the options of a sweep.

    Raises:
        SlzoError: One is out of range.
    """
    if directions < MIN_DIRECTIONS:
        raise SlzoError(
            f"directions {directions}: a mean over so few says little, give at least {MIN_DIRECTIONS} random directions"
        )
    for name, value, least in (("steps", steps, 0), ("num_rows", num_rows, 1)):
        if value < least:
            raise SlzoError(f"{name} {value}: must be at least {least}")
    if not seeds:
        raise SlzoError("seeds []: give at least one seed")
    if layers is not None and not layers:
        raise SlzoError("layers []: give at least one layer, or leave it out for all")
    chosen = range(num_layers) if layers is None else sorted({_layer(n, num_layers) for n in layers})
    return SweepPlan(tuple(chosen), steps, tuple(dict.fromkeys(seeds)), directions, num_rows)


def _layer(layer: int, num_layers: int) -> int:
    return check_layer(layer, num_layers, "layers", left_out="all be trained")


def run_cells(bench: Workbench, store: CellStore, plan: SweepPlan) -> None:
    """Work on every cell that is not finished and that no other process is at, layer by layer from below."""
    num_layers = bench.module.split.num_layers
    trainings = [(layer, seed) for layer in plan.layers for seed in plan.seeds] if plan.steps else []
    # what a cell costs: rows that are evaluated, times the layers that they go through
    work = {f"sensitivity-{n}": 2 * plan.directions * plan.num_rows * (num_layers - n) for n in range(num_layers)}
    data = bench.datamodule
    rows = 2 * plan.steps * bench.module.num_queries * data.batch_size + len(data.rows("dev"))
    work |= {_training(*cell): rows * (num_layers - cell[0]) for cell in trainings}
    clock = _Clock({name: float(cost) for name, cost in work.items() if store.result(name) is None})
    for layer in range(num_layers):
        _work(store, f"sensitivity-{layer}", clock, partial(_measure, bench, plan, layer))
    bench.module.prefix_cache.clear()  # the rows of the sensitivity are few; training begins at its own first layer
    for layer, seed in trainings:
        name = _training(layer, seed)
        _work(store, name, clock, partial(_train, bench, plan, layer, seed))


def _training(layer: int, seed: int) -> str:
    return f"train-{layer}-seed-{seed}"


def _measure(bench: Workbench, plan: SweepPlan, layer: int) -> dict[str, Any]:
    bench.move_prefix(layer)
    seed, rows = plan.seeds[0], plan.num_rows
    return asdict(bench.sensitivity(layer, directions=plan.directions, seed=seed, num_rows=rows))


def _train(bench: Workbench, plan: SweepPlan, layer: int, seed: int) -> dict[str, Any]:
    bench.move_prefix(layer)
    return bench.trial(layer, steps=plan.steps, seed=seed).to_dict()


def _work(store: CellStore, name: str, clock: "_Clock", function: Callable[[], dict[str, Any]]) -> None:
    if store.result(name) is not None:
        clock.forget(name)  # another process has done it
        return
    with store.claim(name) as mine:
        if mine:
            result = function()
            store.save(name, result)
            clock.tick(name, result)


class _Clock:
    """Says what was done and how long the rest will take, at the pace of this process.

    Args:
        work: What each cell that is left costs, in any unit.
    """

    def __init__(self, work: Mapping[str, float]) -> None:
        self._left = dict(work)
        self._done = 0.0
        self._started = self._last = time.monotonic()

    def forget(self, name: str) -> None:
        """Leave a cell out that this process need not do."""
        self._left.pop(name, None)

    def tick(self, name: str, result: dict[str, Any]) -> None:
        """Note a finished cell."""
        now = time.monotonic()
        self._done += self._left.pop(name)
        pace = (now - self._started) / self._done
        words = f"{len(self._left)} cells left, about {_minutes(pace * sum(self._left.values()))}"
        say(f"{name}: {_headline(result)} ({now - self._last:.0f} s; {words if self._left else 'done'})")
        self._last = now


def _headline(result: dict[str, Any]) -> str:
    if "scores" in result:
        last = result["scores"][-1]
        return result["diverged"] or f"dev loss {last['loss']:.4f}, metric {last['metric']:.4f}"
    return f"{result['mean']:.4g} +- {result['standard_error']:.2g}"


def _minutes(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def wait_for_others(store: CellStore, plan: SweepPlan, num_layers: int) -> None:
    """Wait until cells that other processes are at are finished or given up.

    Raises:
        SlzoError: Some were given up.
    """
    names = [f"sensitivity-{n}" for n in range(num_layers)]
    names += [_training(layer, seed) for layer in plan.layers for seed in plan.seeds] if plan.steps else []
    for name in names:
        while store.result(name) is None:
            with store.claim(name) as free:
                if free:
                    raise SlzoError(
                        f"output {str(store.folder)!r}: another process stopped before it finished {name}; run the same "
                        "command again to continue"
                    )
            time.sleep(_WAIT_SECONDS)


def sweep_rows(store: CellStore, plan: SweepPlan, profile: OutlierProfile) -> list[SweepRow]:
    """The figures of each layer, from finished cells."""
    rows = []
    for statistics_ in profile.layers:
        layer = statistics_.index
        found = store.result(f"sensitivity-{layer}")
        sensitivity = Sensitivity(**found)
        cells = (
            [store.result(_training(layer, seed)) for seed in plan.seeds] if layer in plan.layers and plan.steps else []
        )
        trials = [Trial.from_dict(cell) for cell in cells if cell is not None]
        good = [trial for trial in trials if not trial.diverged]
        loss = [trial.scores[-1].loss for trial in good]
        metric = [trial.scores[-1].metric for trial in good]
        rows.append(
            SweepRow(
                layer=layer,
                sensitivity=sensitivity.mean,
                sensitivity_se=sensitivity.standard_error,
                outlier_ratio=statistics_.ratio,
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


def verdict(rows: Iterable[SweepRow], metric: str, chosen: str = "first outlier layer") -> str:
    """One sentence: does the chosen layer win, and by how much?

    Args:
        rows: The layers.
        metric: Name of the task's metric.
        chosen: What to call the layer that the profile chose.
    """
    rows = list(rows)
    dominant = next((row for row in rows if row.dominant), None)
    trained = sorted((row for row in rows if row.gain is not None), key=lambda row: -(row.gain or 0))
    if not trained and any(row.diverged for row in rows):
        return "Every training diverged: lower the learning rate (slzo tune tries several)."
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
            "learning rates (slzo tune) or more steps."
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


def format_rows(rows: Sequence[SweepRow]) -> str:
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
    folder: Path, rows: Sequence[SweepRow], plan: SweepPlan, settings: dict[str, Any], sentence: str
) -> None:
    """Write sweep.csv, sweep.json and sweep.png."""
    names = [field.name for field in fields(SweepRow)]
    with (folder / "sweep.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows({k: "" if v is None else v for k, v in asdict(row).items()} for row in rows)
    content = {
        "verdict": sentence,
        "plan": asdict(plan),
        "settings": settings,
        "torch": torch.__version__,
        "layers": [asdict(row) for row in rows],
    }
    (folder / "sweep.json").write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sweep_figure(rows).savefig(folder / "sweep.png", dpi=120)
