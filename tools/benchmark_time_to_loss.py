"""Measure the processor time and the evaluations until a dev loss is reached, for slzo and for the published MeZO step.

    OMP_NUM_THREADS=1 python tools/benchmark_time_to_loss.py --data_dir DIR --output times
    OMP_NUM_THREADS=1 python tools/benchmark_time_to_loss.py --data_dir DIR --output times --methods published --seconds 10800

Each method trains on the same rows until its dev loss is at the last target or its time is used. Time is that of the steps, with
all that slzo computes before them: the profile, the states below the tuned layer and the step size. Scoring is not counted; the
dev rows are scored each time that the time has grown by a tenth. An evaluation is the loss of a batch at one point. Results are
saved at once, and the same command continues where it stopped. --plot draws the curves.
"""

import json
import random
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from loading import chosen_layers, load, task_rows
from measuring import timed
from options import command, option, parse
from published_step import pad_left, published_step, unmap
from slzo.batches.encoded import EncodedExample
from slzo.experiments.store import CellStore
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.plots.style import lines, new_figure, save, style_axis
from slzo.training.build import adapt_rows, auto_rate, make_stepper, tune
from slzo.training.prefix_plan import plan_prefix
from slzo.zo.estimators import SPSA, Backprop, Estimator, LayerOutputPerturbation
from slzo.zo.optim import set_rate
from slzo.zo.selection import FirstOutlierLayer, OutlierRemovingLayer, SelectionRule
from tables import markdown_table

GROWTH = 1.1
ROWS = (1000, 200, 20)

METHODS = ("default", "adamw", "spsa", "paper", "published")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    model: str = option("smollm2-135m", "model, as in model.model")
    task: str = option("sst2", "task, as in data.task")
    data_dir: str = option(help="folder of the data, as in data.data_dir")
    methods: list[str] = option(list(METHODS), "methods to run", choices=METHODS)
    targets: list[float] = option([0.6, 0.5], "dev losses")
    seconds: float = option(3600, "processor time of each method")
    lr_all: float = option(9e-5, "rate of the published step on all weights")
    lr_layer: float = option(3e-4, "constant rate in the first outlier layer")
    seed: int = option(0, "seed of rows and directions")
    output: str = option("times", "folder of the results")
    plot: Path | None = option(None, "also draw the curves to this path, without suffix")


def train_to(
    step: Callable[[int], int], score: Callable[[], float], target: float, limit: float, used: float = 0.0
) -> list[dict[str, float]]:
    """Train until a dev loss is reached, and score the dev rows each time that the time has grown by a tenth.

    Args:
        step: Takes step 0, 1, ... and returns the number of evaluations so far.
        score: Scores the dev rows.
        target: Dev loss at which the training ends.
        limit: Processor seconds after which it ends.
        used: Processor seconds before the first step.

    Returns:
        Steps, evaluations and processor seconds until each score, and its loss.
    """
    curve = [{"step": 0, "evaluations": 0, "seconds": used, "loss": score()}]
    for number in count():
        seconds, evaluations = timed(partial(step, number), time.process_time)
        used += seconds
        if used < GROWTH * curve[-1]["seconds"] and used < limit:
            continue
        curve.append({"step": number + 1, "evaluations": evaluations, "seconds": used, "loss": score()})
        if curve[-1]["loss"] <= target or used >= limit:
            break
    return curve


def slzo(options: Options, estimator: Estimator, rule: SelectionRule, lr: float | None = None) -> dict[str, Any]:
    """Train the layer of a rule with an estimator of slzo, with the automatic learning rate or a constant one."""
    data = task_rows(options.model, options.task, options.data_dir, ROWS, options.seed)
    training = ZOModule(options.model, estimator=estimator, seed=options.seed).options
    parts = load(training, data, torch.device("cpu"))
    started = time.process_time()
    (layer,) = chosen_layers(parts, data, rule)
    model = tune(parts, training, data, layer)
    plan_prefix(model, data)
    optimizer = training.optimizer.make(model.tensors.masters)
    auto = auto_rate(model, training, data)
    stepper = make_stepper(model, training, data, auto=auto, sets_rate=lr is None)
    if lr is not None:
        set_rate(optimizer, lr)
    used = time.process_time() - started
    batches = data.training_batches()

    def score() -> float:
        return data.score(data.evaluator(model), data.eval_batches("dev"), keep_prefix=True)["loss"]

    def step(number: int) -> int:
        stepper.step(next(batches), number, optimizer)
        return round(stepper.num_evaluations)

    return {"layer": layer, "curve": train_to(step, score, min(options.targets), options.seconds, used)}


def published(options: Options, lr: float) -> dict[str, Any]:
    """Train all weights with the published step and a constant learning rate."""
    data = task_rows(options.model, options.task, options.data_dir, ROWS, options.seed)
    data.setup("fit")
    training = ZOModule(options.model).options
    model: Any = load_model(options.model, "float32")
    unmap(model)
    adapt_rows(data, ModelParts(model), training)
    trained, only_gold = list(model.parameters()), data.objective.only_gold
    batches = _batches([row.encoded for row in data.rows("train")], data.batch_size, random.Random(options.seed))

    def score() -> float:  # as for slzo, which is faster than with the published loss
        tuned = tune(ModelParts(model, onednn=False), training, data, 0)
        try:
            return data.score(data.evaluator(tuned), data.eval_batches("dev"))["loss"]
        finally:
            tuned.release()

    def step(number: int) -> int:
        published_step(model, trained, pad_left(next(batches), only_gold), only_gold, number, lr)
        return 2 * (number + 1)

    with torch.no_grad():
        return {"layer": None, "curve": train_to(step, score, min(options.targets), options.seconds)}


def _batches(rows: list[EncodedExample], size: int, generator: random.Random) -> Iterator[list[EncodedExample]]:
    while True:
        shuffled = generator.sample(rows, len(rows))
        yield from (shuffled[start : start + size] for start in range(0, len(rows) - size + 1, size))


def run(method: str, options: Options) -> dict[str, Any]:
    """Train with a method; return the layer and the curve."""
    match method:
        case "default":
            return slzo(options, LayerOutputPerturbation(), OutlierRemovingLayer())
        case "adamw":
            return slzo(options, Backprop(), OutlierRemovingLayer())
        case "spsa":
            return slzo(options, SPSA(), OutlierRemovingLayer())
        case "paper":
            return slzo(options, SPSA(), FirstOutlierLayer(), options.lr_layer)
    return published(options, options.lr_all)


def reached(curve: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """Return the first score at or below a target."""
    return next((score for score in curve if score["loss"] <= target), None)


def report(results: dict[str, dict[str, Any]], targets: list[float]) -> str:
    """Return a table: seconds, steps and evaluations until each target."""
    rows = []
    for name, result in results.items():
        curve = result["curve"]
        cells = []
        for target in targets:
            found = reached(curve, target)
            cells.append(
                f"not in {curve[-1]['seconds']:.0f} s"
                if found is None
                else f"{found['seconds']:.1f} s, {found['step']:.0f} steps, {found['evaluations']:.0f} evaluations"
            )
        lowest = min(score["loss"] for score in curve)
        layer = "all" if result["layer"] is None else result["layer"]
        rows.append([f"`{name}`", layer, *cells, f"{lowest:.3f}"])
    return markdown_table(["method", "layer", *(f"{target:g}" for target in targets), "lowest"], rows)


def draw(results: dict[str, dict[str, Any]], targets: list[float], path: Path) -> None:
    """Draw the dev loss over seconds, which are logarithmic."""
    figure = new_figure(8, 4.5, "Dev loss over training time")
    axis = figure.subplots()
    for (name, result), (colour, dashes) in zip(results.items(), lines(len(results)), strict=True):
        at = [max(score["seconds"], 1.0) for score in result["curve"]]
        axis.plot(at, [score["loss"] for score in result["curve"]], color=colour, linestyle=dashes, label=name)
    for target in targets:
        axis.axhline(target, color="black", linewidth=0.5)
    axis.set_xscale("log")
    style_axis(axis, "processor seconds", "dev loss", whole=False)
    axis.legend(fontsize=8, frameon=False)
    save(figure, path.parent, path.name)


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing methods and print the table."""
    options = parse(Options, __doc__, argv)
    names = ("model", "task", "seed", "targets", "lr_all", "lr_layer")
    settings = {name: getattr(options, name) for name in names} | {"threads": torch.get_num_threads()}
    store = CellStore(options.output, settings)

    def show(name: str, result: dict[str, Any]) -> None:
        print(f"{name}: {json.dumps(result['curve'][-1])}", flush=True)

    store.complete({name: partial(run, name, options) for name in options.methods}, show)
    results = {name: found for name in METHODS if (found := store.result(name)) is not None}
    print(report(results, options.targets))
    if options.plot:
        draw(results, options.targets, options.plot)


if __name__ == "__main__":
    sys.exit(main())
