"""Measure the processor time and the evaluations until a dev loss is reached, for slzo and for the published MeZO step.

    OMP_NUM_THREADS=1 python tools/benchmark_time_to_loss.py --data_dir DIR --output times
    OMP_NUM_THREADS=1 python tools/benchmark_time_to_loss.py --data_dir DIR --output times --methods published --seconds 10800

Each method trains on the same rows until its dev loss is at the last target or its time is used. Time is that of the steps, with
all that slzo computes before them: the profile, the states below the tuned layer and the step size. Scoring is not counted; the
dev rows are scored each time that the time has grown by a tenth. An evaluation is the loss of a batch at one point. Results are
saved at once, and the same command continues where it stopped. --picture draws the curves.
"""

import argparse
import json
import random
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any

import torch

from published_step import pad_left, published_step, unmap
from slzo.batches.encoded import EncodedExample
from slzo.experiments.store import CellStore
from slzo.models.load import load_model
from slzo.models.parts import ModelParts
from slzo.module import ZOModule
from slzo.pictures.style import lines, new_figure, save, style_axis
from slzo.prefix_plan import plan_prefix
from slzo.profiling import ProfileOptions, choose, profile_model
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, auto_rate, load_parts, make_stepper, tune
from slzo.zo.estimators import SPSA, Backprop, LayerOutputPerturbation
from slzo.zo.optim import set_rate
from slzo.zo.selection import FirstOutlierLayer, OutlierRemovingLayer, SelectionRule

GROWTH = 1.1
SIZES: dict[str, Any] = {"num_train": 1000, "num_dev": 200, "num_test": 20, "batch_size": 16}


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
        started = time.process_time()
        evaluations = step(number)
        used += time.process_time() - started
        if used < GROWTH * curve[-1]["seconds"] and used < limit:
            continue
        curve.append({"step": number + 1, "evaluations": evaluations, "seconds": used, "loss": score()})
        if curve[-1]["loss"] <= target or used >= limit:
            break
    return curve


def make_rows(args: argparse.Namespace) -> TaskRows:
    """Return the rows of the task."""
    folder = None if args.task == "movie_reviews" else args.data_dir
    rows = TaskRows(args.task, tokenizer=args.model, data_dir=folder, seed=args.seed, **SIZES)
    rows.setup("fit")
    return rows


def slzo(args: argparse.Namespace, estimator: Any, rule: SelectionRule, lr: float | None = None) -> dict[str, Any]:
    """Train the layer of a rule with an estimator of slzo, with the automatic learning rate or a constant one."""
    rows = make_rows(args)
    options = ZOModule(args.model, estimator=estimator, seed=args.seed).options
    parts = load_parts(options, torch.device("cpu"))
    adapt_rows(rows, parts, options)
    started = time.process_time()
    profile = profile_model(parts, rows, ProfileOptions(rule, 16, None))
    choice = choose(profile, rule, "this benchmark times one layer", rows)
    model = tune(parts, options, rows, choice.layer)
    plan_prefix(model, rows)
    optimizer = options.optimizer.make(model.tensors.masters)
    auto = auto_rate(make_stepper(model, options, rows), rows)
    stepper = make_stepper(model, options, rows, auto=auto, sets_rate=lr is None)
    if lr is not None:
        set_rate(optimizer, lr)
    used = time.process_time() - started
    batches = rows.training_batches()

    def score() -> float:
        return rows.score(rows.evaluator(model), rows.eval_batches("dev"), keep_prefix=True)["loss"]

    def step(number: int) -> int:
        stepper.step(next(batches), number, optimizer)
        return round(stepper.num_evaluations)

    return {"layer": choice.layer, "curve": train_to(step, score, min(args.targets), args.seconds, used)}


def published(args: argparse.Namespace, lr: float) -> dict[str, Any]:
    """Train all weights with the published step and a constant learning rate."""
    rows = make_rows(args)
    options = ZOModule(args.model).options
    model: Any = load_model(args.model, "float32")
    unmap(model)
    adapt_rows(rows, ModelParts(model), options)
    trained, only_gold = list(model.parameters()), rows.objective.only_gold
    batches = _batches([row.encoded for row in rows.rows("train")], rows.batch_size, random.Random(args.seed))

    def score() -> float:  # as for slzo, which is faster than with the published loss
        tuned = tune(ModelParts(model, onednn=False), options, rows, 0)
        try:
            return rows.score(rows.evaluator(tuned), rows.eval_batches("dev"))["loss"]
        finally:
            tuned.release()

    def step(number: int) -> int:
        published_step(model, trained, pad_left(next(batches), only_gold), only_gold, number, lr)
        return 2 * (number + 1)

    with torch.no_grad():
        return {"layer": None, "curve": train_to(step, score, min(args.targets), args.seconds)}


def _batches(rows: list[EncodedExample], size: int, generator: random.Random) -> Iterator[list[EncodedExample]]:
    while True:
        shuffled = generator.sample(rows, len(rows))
        yield from (shuffled[start : start + size] for start in range(0, len(rows) - size + 1, size))


METHODS: dict[str, Callable[[argparse.Namespace], dict[str, Any]]] = {
    "default": lambda args: slzo(args, LayerOutputPerturbation(), OutlierRemovingLayer()),
    "adamw": lambda args: slzo(args, Backprop(), OutlierRemovingLayer()),
    "spsa": lambda args: slzo(args, SPSA(), OutlierRemovingLayer()),
    "paper": lambda args: slzo(args, SPSA(), FirstOutlierLayer(), args.lr_layer),
    "published": lambda args: published(args, args.lr_all),
}


def reached(curve: list[dict[str, float]], target: float) -> dict[str, float] | None:
    """Return the first score at or below a target."""
    return next((score for score in curve if score["loss"] <= target), None)


def report(results: dict[str, dict[str, Any]], targets: list[float]) -> str:
    """Return a table: seconds, steps and evaluations until each target."""
    heads = "".join(f" {target:g} |" for target in targets)
    lines_ = [f"| method | layer |{heads} lowest |", f"|---|--:|{'--:|' * len(targets)}--:|"]
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
        lines_.append(f"| `{name}` | {layer} | {' | '.join(cells)} | {lowest:.3f} |")
    return "\n".join(lines_)


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


def main() -> None:
    """Run the missing methods and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m", help="model, as in model.model")
    parser.add_argument("--task", default="sst2", help="task, as in data.task")
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--targets", nargs="+", type=float, default=[0.6, 0.5], help="dev losses")
    parser.add_argument("--seconds", type=float, default=3600, help="processor time of each method")
    parser.add_argument("--lr_all", type=float, default=9e-5, help="rate of the published step on all weights")
    parser.add_argument("--lr_layer", type=float, default=3e-4, help="constant rate in the first outlier layer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="times", help="folder of the results")
    parser.add_argument("--picture", help="also draw the curves to this path, without suffix")
    args = parser.parse_args()
    options = ("model", "task", "seed", "targets", "lr_all", "lr_layer")
    settings = {name: getattr(args, name) for name in options} | {"threads": torch.get_num_threads()}
    store = CellStore(args.output, settings)

    def say(name: str, result: dict[str, Any]) -> None:
        print(f"{name}: {json.dumps(result['curve'][-1])}", flush=True)

    store.complete({name: partial(METHODS[name], args) for name in args.methods}, say)
    results = {name: found for name in METHODS if (found := store.result(name)) is not None}
    print(report(results, args.targets))
    if args.picture:
        draw(results, args.targets, Path(args.picture))


if __name__ == "__main__":
    main()
