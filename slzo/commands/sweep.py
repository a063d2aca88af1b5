"""``slzo sweep``."""

from pathlib import Path
from typing import Literal

from slzo.cli.app import App
from slzo.experiments.layer_trials import LayerTrials
from slzo.experiments.store import check_results
from slzo.experiments.sweep import sweep_layers
from slzo.experiments.sweep_cells import option_settings
from slzo.experiments.sweep_plan import MIN_DIRECTIONS, SweepPlan
from slzo.experiments.sweep_rates import PER_CELL_SETTINGS, RatePlan, sweep_rates
from slzo.experiments.workers import workers as worker_processes
from slzo.fit import choose_layer
from slzo.lightning.run_context import run_context
from slzo.task_data import TaskData
from slzo.utils.errors import SlzoError


def sweep(
    app: App,
    layers: list[int] | None = None,
    lrs: list[float] | Literal["auto"] | None = None,
    eps: list[float] | None = None,
    steps: int = 120,
    seeds: list[int] | None = None,
    directions: int | None = None,
    seconds: float | None = None,
    workers: int = 1,
    output: str | None = None,
) -> None:
    """Train every decoder layer for the same steps and seeds and compare: sweep.csv, sweep.json, sweep.png.

    With lrs or eps it trains only the chosen layer, with each of the values, and recommends one: rates.json.

    After an interrupt, the same command continues where it stopped. The same command can also run on several machines that share
    the folder, such as the tasks of a SLURM array: they divide the work, and take over what one of them leaves undone.

    Args:
        app: Trainer, model and rows; the model's scope is tuned in each layer.
        layers: Layers to train, counted from 0; by default all. The sensitivity is measured in all layers.
        lrs: Learning rates to compare in the chosen layer; auto tries seven around the configured or measured one, from 1/30 of
            it to 30 times it.
        eps: Perturbation sizes to compare; by default the configured one. Without lrs each is tried with seven rates.
        steps: Steps of each training; 0 only measures the sensitivity of the layers.
        seeds: Seeds of each layer or rate; by default that of seed_everything.
        directions: Maximum number of random directions per layer for the sensitivity, 20 or more, or 0 to skip it; by default 20.
        seconds: Training time of each layer in seconds; layers that finish earlier continue until then. The verdict and
            sweep_curves.png then cover both steps and seconds.
        workers: Processes on this machine that divide the trainings, the processor's cores and the GPUs.
        output: Folder of the results; by default sweeps/MODEL-TASK.
    """
    options = app.model.options
    own_seeds = (options.noise_seed,) if seeds is None else tuple(seeds)
    app.check_one_process("sweep")
    plan: SweepPlan | RatePlan
    if lrs is not None or eps is not None:
        layer_options = {"layers": layers, "seconds": seconds, "directions": directions}
        if given := [name for name, value in layer_options.items() if value is not None]:
            raise SlzoError(
                f"{given[0]} {layer_options[given[0]]}: leave it out, as lrs and eps compare rates in one layer"
            )
        plan = RatePlan(None if lrs == "auto" else lrs, eps, steps, own_seeds)
        plan.check(options.estimator, options.optimizer)
    else:
        if steps == 0 and seconds is not None:
            raise SlzoError(f"seconds {seconds}: with steps 0 nothing is trained; leave it out, or give steps")
        most = MIN_DIRECTIONS if directions is None else directions
        plan = SweepPlan(None if layers is None else tuple(layers), steps, own_seeds, most, seconds)
    options.optimizer.check_schedule(steps, None)
    kind = "-rates" if isinstance(plan, RatePlan) else ""
    folder = Path(output or f"sweeps/{Path(options.model).name}-{app.datamodule.task.name}{kind}")
    known = option_settings(options, app.datamodule)
    if isinstance(plan, RatePlan):
        known |= PER_CELL_SETTINGS | {"steps": steps}
        if options.layer is not None and options.scope.needs_layer:
            known["model.layer"] = options.layer
    check_results(folder, known)
    with worker_processes(workers):
        parts, data = app.load()
        options.check_objective(data.objective)
        trials, run = LayerTrials(parts, options, data), run_context(app.trainer, app.datamodule)
        if steps:
            _check_dev_rows(data)
        if isinstance(plan, RatePlan):
            sweep_rates(trials, plan, lambda: choose_layer(parts, options, data, run).layer, folder)
        else:
            assert run.profiler is not None
            sweep_layers(trials, plan.of_model(parts.num_layers), run.profiler, folder)


def _check_dev_rows(data: TaskData) -> None:
    """Refuse a sweep without dev rows to compare by."""
    if data.reward is None and not any(row.example.is_labelled for row in data.rows("dev")):
        what = "none of the dev rows has a label" if data.rows("dev") else "there are none"
        raise SlzoError(
            f"data.num_dev {data.num_dev}: trainings are compared by their dev loss, and {what}; give labelled ones"
        )
