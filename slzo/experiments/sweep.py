"""Train each decoder layer with the same seeds for the same steps, or the same time, and compare it with the chosen layer."""

import time
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from slzo.experiments.layer_trials import SENSITIVITY_ROWS, LayerTrials
from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import MIN_DIRECTIONS, SweepPlan, sensitivity_cell
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
    # the lengths of trainings are in the names of their cells, so others may be added later
    settings = trials.settings() | {"directions": plan.directions, "seed_of_sensitivity": plan.seeds[0]}
    store = CellStore(output or trials.default_folder(), settings)
    profile = profile_model()
    run_cells(trials, store, plan)
    if is_worker():
        return
    rows = layer_results(store, plan, profile)
    curves = seed_curves(store, plan)
    if plan.seconds is not None and curves:
        sentence = curves_verdict(curves, plan, profile.dominant_layer)
    else:
        sentence = verdict(rows, trials.rows.selection_metric.metric, profile.title)
    title = f"{Path(trials.options.model).name} on {task}: {scope.describe()}"
    write_sweep(store.folder, rows, plan, settings, sentence, layer_curves(curves), title)
    say(format_rows(rows))
    say(f"\n{sentence}\nFiles      {store.folder}")


def run_cells(trials: LayerTrials, store: CellStore, plan: SweepPlan) -> None:
    """Compute all cells together with the other processes on the same folder, lowest layer first."""
    num_layers, options = trials.parts.num_layers, trials.options
    cost = trials.cost(trials.num_dev)
    measured = range(num_layers if plan.directions else 0)
    work = {
        sensitivity_cell(layer): 2.0 * plan.directions * SENSITIVITY_ROWS * cost.layers(layer) for layer in measured
    }
    evaluations = options.estimator.evaluations(options.step.num_queries)
    rows = evaluations * plan.steps * trials.rows.batch_size + trials.num_dev
    if plan.seconds is not None:  # all trainings cost the same, about twice the sensitivity of layer 0
        each = 4.0 * MIN_DIRECTIONS * SENSITIVITY_ROWS * cost.layers(0)
        work |= dict.fromkeys((plan.training_cell(*training) for training in plan.trainings), each)
    else:
        work |= {plan.training_cell(layer, seed): rows * cost.layers(layer) for layer, seed in plan.trainings}

    def sensitivity(layer: int) -> dict[str, Any]:
        found = trials.sensitivity(layer, plan.directions, plan.seeds[0])
        if layer == num_layers - 1:  # it used few rows, and the trainings begin at a lower layer again
            trials.clear_prefix()
        return asdict(found)

    def train(layer: int, seed: int) -> dict[str, Any]:
        return asdict(trials.run(layer, steps=plan.steps, seed=seed, seconds=plan.seconds))

    cells = {sensitivity_cell(layer): partial(sensitivity, layer) for layer in measured}
    cells |= {plan.training_cell(*training): partial(train, *training) for training in plan.trainings}
    store.complete(cells, _Clock(work, store).tick)


class _Clock:
    """Reports each finished cell and the estimated time for the others, at the pace of this process.

    Args:
        work: Cost of each cell, in any unit.
        store: The results so far.
    """

    def __init__(self, work: Mapping[str, float], store: CellStore) -> None:
        self._work, self._store = work, store
        self._done = 0.0
        self._started = self._last = time.monotonic()

    def tick(self, name: str, result: dict[str, Any]) -> None:
        """Report a finished cell."""
        now = time.monotonic()
        self._done += self._work[name]
        left = [units for other, units in self._work.items() if self._store.result(other) is None]
        if "scores" in result:
            last = result["scores"][-1]
            found = result["diverged"] or f"dev loss {last['loss']:.4f}, metric {last['metric']:.4f}"
        else:
            found = f"{result['mean']:.4g} +- {result['standard_error']:.2g}, {result['directions']} directions"
        rest = f"{len(left)} cells left, about {duration((now - self._started) / self._done * sum(left))}"
        say(f"{name}: {found} ({duration(now - self._last)}; {rest if left else 'done'})")
        self._last = now
