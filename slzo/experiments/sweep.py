"""Tunes every decoder layer for the same steps and seeds: does the first outlier layer win?"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any

from slzo.console import say
from slzo.errors import SlzoError
from slzo.experiments.store import CellStore
from slzo.experiments.sweep_plan import SweepPlan, plan_sweep, sensitivity_cell, training_cell
from slzo.experiments.sweep_report import format_rows, layer_results, verdict, write_sweep
from slzo.experiments.trial import Workbench, default_folder, experiment_settings
from slzo.zo.profile import OutlierProfile

_WAIT_SECONDS = 2.0


def sweep(
    bench: Workbench,
    measure: Callable[[], OutlierProfile],
    *,
    layers: Sequence[int] | None,
    steps: int,
    seeds: Sequence[int] | None,
    directions: int,
    num_rows: int,
    output: str | None,
) -> None:
    """Do what is not done yet and write the results; arguments as :meth:`slzo.trainer.ZOTrainer.sweep`, 0 steps to train nothing.

    Raises:
        SlzoError: An option is out of range, or the folder holds other results.
    """
    module, datamodule = bench.module, bench.datamodule
    if not module.scope.needs_layer:
        raise SlzoError(f"model.scope: a sweep goes over the dominant layer, and {module.scope.describe()} has none")
    seeds = [module.noise_seed or 0] if seeds is None else seeds
    plan = plan_sweep(module.parts.num_layers, layers, steps, seeds, directions, num_rows)
    settings = experiment_settings(module, datamodule) | {
        "directions": directions,
        "num_rows": num_rows,
        "steps": plan.steps or None,
        "seed_of_sensitivity": plan.seeds[0],
    }
    # the sensitivity does not depend on the steps: a first look may be followed by trainings
    store = CellStore(output or default_folder("sweeps", bench), settings, open_settings=("steps",))
    profile = measure()
    run_cells(bench, store, plan)
    wait_for_others(store, plan, module.parts.num_layers)
    rows = layer_results(store, plan, profile)
    sentence = verdict(rows, datamodule.task.metric, profile.title)
    write_sweep(store.folder, rows, plan, settings, sentence)
    say(format_rows(rows))
    say(f"\n{sentence}\nFiles      {store.folder}")


def run_cells(bench: Workbench, store: CellStore, plan: SweepPlan) -> None:
    """Work on every cell that is not finished and that no other process is at, layer by layer from below."""
    num_layers = bench.module.parts.num_layers
    trainings = [(layer, seed) for layer in plan.layers for seed in plan.seeds] if plan.steps else []
    # what a cell costs: rows that are evaluated, times the layers that they go through
    work = {sensitivity_cell(n): 2 * plan.directions * plan.num_rows * (num_layers - n) for n in range(num_layers)}
    data = bench.datamodule
    rows = 2 * plan.steps * bench.module.step_options.num_queries * data.batch_size + len(data.rows("dev"))
    work |= {training_cell(*cell): rows * (num_layers - cell[0]) for cell in trainings}
    clock = _Clock({name: float(cost) for name, cost in work.items() if store.result(name) is None})
    for layer in range(num_layers):
        _work(store, sensitivity_cell(layer), clock, partial(_measure, bench, plan, layer))
    bench.forget_prefix()  # the rows of the sensitivity are few; training begins at its own first layer
    for layer, seed in trainings:
        name = training_cell(layer, seed)
        _work(store, name, clock, partial(_train, bench, plan, layer, seed))


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
    names = [sensitivity_cell(n) for n in range(num_layers)]
    names += [training_cell(layer, seed) for layer in plan.layers for seed in plan.seeds] if plan.steps else []
    for name in names:
        while store.result(name) is None:
            with store.claim(name) as free:
                if free:
                    raise SlzoError(
                        f"output {str(store.folder)!r}: another process stopped before it finished {name}; run the same "
                        "command again to continue"
                    )
            time.sleep(_WAIT_SECONDS)
