"""Train each decoder layer with the same seeds for the same steps, or the same time, and compare it with the chosen layer."""

from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.sensitivity import measure_sensitivity
from slzo.experiments.store import CellStore
from slzo.experiments.sweep_cells import complete_cells, sweep_settings
from slzo.experiments.sweep_plan import SweepPlan
from slzo.experiments.sweep_report import SweepResult
from slzo.report.profile_files import format_profile
from slzo.training.profiling import ProfileOptions, choose, profile_model
from slzo.utils.console import is_worker, rank_zero_print
from slzo.utils.errors import SlzoError
from slzo.zo.profile import OutlierProfile
from slzo.zo.scopes.base import check_layer
from slzo.zo.selection import Choice, SelectionContext


def sweep_layers(trials: LayerTrials, plan: SweepPlan, profiler: ProfileOptions, folder: Path) -> None:
    """Profile the layers, compute all cells that are not finished, and write the results to ``folder``.

    Raises:
        SlzoError: The scope has no dominant layer, or the folder holds other results.
    """
    scope, task = trials.options.scope, trials.data.task.name
    if not scope.needs_layer:
        raise SlzoError(
            f"model.scope: a sweep varies the dominant layer, and {scope.describe()} has none; use LayerScope"
        )
    # lengths, seeds and numbers of directions are in the names of the cells, so others may be added later
    settings = sweep_settings(trials)
    store = CellStore(folder, settings)
    profile, choice = _profile(trials, profiler)
    run_cells(trials, store, plan)
    if is_worker():
        return
    finished = _finished(store, plan, trials.parts.num_layers)
    result = SweepResult.of(store, finished, profile.layers, choice, trials.data.selection_metric.loss_name)
    result.write(store.folder, settings, f"{Path(trials.options.model).name} on {task}: {scope.describe()}")
    rank_zero_print(f"{result.table()}\n\n{result.verdict()}\nFiles      {store.folder}")


def _profile(trials: LayerTrials, profiler: ProfileOptions) -> tuple[OutlierProfile, Choice | None]:
    """Profile the layers, and print the profile with the layer that the rule or the user chooses, if any.

    Raises:
        SlzoError: The model does not have the layer of ``model.layer``.
    """
    parts, options, data = trials.parts, trials.options, trials.data
    chosen = None
    if options.layer is not None:
        chosen = Choice(check_layer(options.layer, parts.num_layers), "set by model.layer")
    profile = profile_model(parts, data, profiler)
    if chosen is None:
        context = SelectionContext(profile.layers, no_trials="a sweep trains all layers itself")
        try:
            chosen = choose(profiler.rule, context, data)
        except SlzoError as error:
            rank_zero_print(f"{format_profile(profile, None)}\n{error}")
            return profile, None
    rank_zero_print(format_profile(profile, chosen))
    return profile, chosen


def _finished(store: CellStore, plan: SweepPlan, num_layers: int) -> SweepPlan:
    """Return the plan with all layers that were trained in the folder with its steps, seconds and seeds."""
    if not plan.steps:
        return plan

    def is_done(layer: int) -> bool:
        return all(store.result(plan.training_cell(layer, seed)) is not None for seed in plan.seeds)

    return replace(plan, layers=tuple(filter(is_done, range(num_layers))))


def run_cells(trials: LayerTrials, store: CellStore, plan: SweepPlan) -> None:
    """Compute sensitivities, then trainings, lowest layer first, together with the other processes on the same folder."""

    def sensitivity(layer: int) -> dict[str, Any]:
        return asdict(measure_sensitivity(trials, layer, plan.directions, plan.seeds[0]))

    def train(layer: int, seed: int) -> dict[str, Any]:
        return asdict(trials.run(layer, steps=plan.steps, seed=seed, seconds=plan.seconds))

    loss = trials.data.selection_metric.loss_name
    measured = range(trials.parts.num_layers if plan.directions else 0)
    complete_cells(store, {plan.sensitivity_cell(layer): partial(sensitivity, layer) for layer in measured}, loss)
    trials.clear_prefix()  # the sensitivities used few rows, and the trainings begin at a lower layer again
    complete_cells(store, {plan.training_cell(*each): partial(train, *each) for each in plan.trainings}, loss)
