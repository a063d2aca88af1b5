"""Train each decoder layer with the same seeds for the same steps, or the same time, and compare it with the chosen layer."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import SweepPlan
from slzo.experiments.sweep_report import (
    curves_verdict,
    format_rows,
    layer_curves,
    layer_results,
    seed_curves,
    verdict,
    write_sweep,
)
from slzo.report.forecast import duration
from slzo.utils.console import is_worker, say
from slzo.utils.errors import SlzoError
from slzo.zo.profile import OutlierProfile


def sweep_layers(
    trials: LayerTrials, plan: SweepPlan, profile_model: Callable[[], OutlierProfile], output: str | None
) -> None:
    """Compute all cells that are not finished and write the results to ``output``, by default to sweeps/MODEL-TASK.

    Raises:
        SlzoError: The scope has no dominant layer, or the folder holds other results.
    """
    scope, task = trials.options.scope, trials.rows.task.name
    if not scope.needs_layer:
        raise SlzoError(
            f"model.scope: a sweep varies the dominant layer, and {scope.describe()} has none; use LayerScope"
        )
    # lengths, seeds and numbers of directions are in the names of the cells, so others may be added later
    settings = trials.settings()
    store = CellStore(output or trials.default_folder(), settings)
    profile = profile_model()
    run_cells(trials, store, plan)
    if is_worker():
        return
    rows = layer_results(store, plan, profile)
    curves = seed_curves(store, plan)
    if plan.seconds is not None and curves:
        sentence = curves_verdict(curves, plan, profile.dominant_layer, profile.title)
    else:
        sentence = verdict(rows, profile.title)
    title = f"{Path(trials.options.model).name} on {task}: {scope.describe()}"
    write_sweep(store.folder, rows, plan, settings, sentence, layer_curves(curves), title)
    say(format_rows(rows))
    say(f"\n{sentence}\nFiles      {store.folder}")


def run_cells(trials: LayerTrials, store: CellStore, plan: SweepPlan) -> None:
    """Compute sensitivities, then trainings, lowest layer first, together with the other processes on the same folder."""

    def sensitivity(layer: int) -> dict[str, Any]:
        return asdict(trials.sensitivity(layer, plan.directions, plan.seeds[0]))

    def train(layer: int, seed: int) -> dict[str, Any]:
        return asdict(trials.run(layer, steps=plan.steps, seed=seed, seconds=plan.seconds))

    measured = range(trials.parts.num_layers if plan.directions else 0)
    _complete(store, {plan.sensitivity_cell(layer): partial(sensitivity, layer) for layer in measured})
    trials.clear_prefix()  # the sensitivities used few rows, and the trainings begin at a lower layer again
    _complete(store, {plan.training_cell(*training): partial(train, *training) for training in plan.trainings})


def _complete(store: CellStore, cells: Mapping[str, Callable[[], Any]]) -> None:
    """Compute cells of one kind; report each of them, and the time for the others at the mean time of those before."""
    started, done = time.monotonic(), count(1)

    def report(name: str, result: Mapping[str, Any]) -> None:
        if "scores" in result:
            last = result["scores"][-1]
            found = result["diverged"] or f"dev loss {last['loss']:.4f}, metric {last['metric']:.4f}"
        else:
            found = f"{result['mean']:.4g} +- {result['standard_error']:.2g}, {result['directions']} directions"
        left, each = sum(store.result(other) is None for other in cells), (time.monotonic() - started) / next(done)
        say(f"{name}: {found} ({f'{left} cells left, about {duration(left * each)}' if left else 'done'})")

    store.complete(cells, report)
