"""Tunes every decoder layer for the same steps, or the same time, and seeds: does the chosen layer win?"""

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from slzo.console import say
from slzo.errors import SlzoError
from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import SweepPlan, sensitivity_cell, training_cell
from slzo.experiments.sweep_report import (
    curves_verdict,
    format_rows,
    layer_curves,
    layer_results,
    seed_curves,
    verdict,
    write_sweep,
)
from slzo.experiments.trial import Sensitivity, Trial, Workbench
from slzo.zo.profile import OutlierProfile

_WAIT_SECONDS = 2.0
BESIDE_LAYERS = 1.5
"""What noise, update and head cost beside the layers, in layers: fitted to docs/results.md, within 3% of its seconds."""


def sweep(bench: Workbench, plan: SweepPlan, measure: Callable[[], OutlierProfile], output: str | None) -> None:
    """Do what is not done yet and write the results to ``output``, or sweeps/MODEL-TASK; ``measure`` profiles the model.

    Raises:
        SlzoError: The scope has no dominant layer, or the folder holds other results.
    """
    module, datamodule = bench.module, bench.datamodule
    if not module.scope.needs_layer:
        raise SlzoError(f"model.scope: a sweep goes over the dominant layer, and {module.scope.describe()} has none")
    settings = bench.settings() | {
        "directions": plan.directions,
        "num_rows": plan.num_rows,
        "max_error": plan.max_error,
        "steps": plan.steps or None,
        "seconds": plan.seconds if plan.steps else None,
        "seed_of_sensitivity": plan.seeds[0],
    }
    # the sensitivity does not depend on the steps: a first look may be followed by trainings
    store = CellStore(output or bench.default_folder("sweeps"), settings, open_settings=("steps", "seconds"))
    profile = measure()
    names = run_cells(bench, store, plan)
    wait_for_others(store, names)
    rows = layer_results(store, plan, profile)
    sentence = verdict(rows, datamodule.judge.metric, profile.title)
    curves = seed_curves(store, plan)
    if plan.seconds is not None and curves:
        sentence = curves_verdict(curves, plan, profile.dominant_layer)
    title = f"{Path(module.model_name).name} on {datamodule.task.name}: {module.scope.describe()}"
    write_sweep(store.folder, rows, plan, settings, sentence, layer_curves(curves), title)
    say(format_rows(rows))
    say(f"\n{sentence}\nFiles      {store.folder}")


def run_cells(bench: Workbench, store: CellStore, plan: SweepPlan) -> list[str]:
    """Work on every cell that is not finished and that no other process is at, layer by layer from below.

    Returns:
        The names of all cells.
    """
    num_layers, data = bench.module.parts.num_layers, bench.datamodule
    # what a cell costs: rows that are evaluated, times the layers that they go through
    depth = [num_layers - n + BESIDE_LAYERS for n in range(num_layers)]
    work = {sensitivity_cell(n): 2.0 * plan.directions * plan.num_rows * depth[n] for n in range(num_layers)}
    rows = 2 * plan.steps * bench.module.step_options.num_queries * data.batch_size + len(data.rows("dev"))
    if plan.seconds is not None:  # all cost the same, about as much as the sensitivity of the first layers
        work |= dict.fromkeys((training_cell(*training) for training in plan.trainings), 2 * work[sensitivity_cell(0)])
    else:
        work |= {training_cell(layer, seed): rows * depth[layer] for layer, seed in plan.trainings}
    clock = _Clock({name: cost for name, cost in work.items() if store.result(name) is None})

    def run(name: str, layer: int, function: Callable[..., Sensitivity | Trial], **options: Any) -> None:
        if store.result(name) is not None:
            clock.forget(name)  # another process has done it
            return
        with store.claim(name) as mine:
            if mine:
                bench.move_prefix(layer)
                result = asdict(function(layer, **options))
                store.save(name, result)
                clock.tick(name, result)

    measured = {
        "directions": plan.directions,
        "seed": plan.seeds[0],
        "num_rows": plan.num_rows,
        "max_error": plan.max_error,
    }
    for layer in range(num_layers):
        run(sensitivity_cell(layer), layer, bench.sensitivity, **measured)
    bench.forget_prefix()  # the rows of the sensitivity are few; training begins at its own first layer
    for layer, seed in plan.trainings:
        run(training_cell(layer, seed), layer, bench.trial, steps=plan.steps, seed=seed, seconds=plan.seconds)
    return list(work)


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
        if "scores" in result:
            last = result["scores"][-1]
            found = result["diverged"] or f"dev loss {last['loss']:.4f}, metric {last['metric']:.4f}"
        else:
            found = f"{result['mean']:.4g} +- {result['standard_error']:.2g}, {result['directions']} directions"
        seconds = (now - self._started) / self._done * sum(self._left.values())
        rest = f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"
        left = f"{len(self._left)} cells left, about {rest}" if self._left else "done"
        say(f"{name}: {found} ({now - self._last:.0f} s; {left})")
        self._last = now


def wait_for_others(store: CellStore, names: Iterable[str]) -> None:
    """Wait until cells that other processes are at are finished or given up.

    Raises:
        SlzoError: Some were given up.
    """
    for name in names:
        while store.result(name) is None:
            with store.claim(name) as free:
                if free:
                    raise SlzoError(
                        f"output {str(store.folder)!r}: another process stopped before it finished {name}; run the same "
                        "command again to continue"
                    )
            time.sleep(_WAIT_SECONDS)
