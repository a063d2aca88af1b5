"""Compare estimators on the same layer at equal training time: dev loss and held-out score.

    python tools/research/methods_at_equal_time.py --data_dir DIR --output cells
    python tools/research/methods_at_equal_time.py --data_dir DIR --output cells --models gemma3-270m --tasks cb --seeds 0 1

A cell is a model, a task, a layer, a method and a seed. It trains for --seconds of processor time, with the states below the
layer computed before. The dev rows are scored after 2 s and each time that the time has grown by half, since fast steps reach
their lowest dev loss soon. The weights with the lowest dev loss are scored on the held-out rows.
Learning rates are automatic; for exact, which is AdamW with the gradient by back-propagation, the better of the automatic rate
and a third of it is taken, by dev loss. Results are saved at once, and the same command continues where it stopped; several
processes can share the folder. --report prints the table.
"""

import argparse
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import lru_cache, partial
from itertools import product
from pathlib import Path
from typing import Any

import torch

from slzo.experiments.store import CellStore
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.module import ZOModule
from slzo.prefix_plan import fill_prefix, plan_prefix
from slzo.task_rows import TaskRows
from slzo.training import adapt_rows, auto_rate, load_parts, make_stepper, tune
from slzo.zo.estimators import SPSA, Backprop, Estimator, LayerOutputPerturbation
from slzo.zo.optim import set_rate
from slzo.zo.options import TrainingOptions
from slzo.zo.profile import profile_layers
from slzo.zo.scopes import ActivationSubspace, LayerScope, Scope
from slzo.zo.selection import FirstOutlierLayer, OutlierRemovingLayer, SelectionContext

METHODS: dict[str, tuple[type[Estimator], type[Scope], tuple[float, ...]]] = {
    "spsa": (SPSA, LayerScope, (1.0,)),
    "output": (LayerOutputPerturbation, LayerScope, (1.0,)),
    "exact": (Backprop, LayerScope, (1.0, 1 / 3)),
    "subspace": (SPSA, ActivationSubspace, (1.0,)),
}
# training, dev and held-out rows; CB and COPA have few, and the rows of the last three are long
ROWS = {
    "cb": (200, 50, 56),
    "copa": (300, 100, 100),
    "rte": (500, 100, 185),
    "boolq": (300, 50, 100),
    "squad": (200, 50, 50),
}
FIRST_CHECK, GROWTH = 2.0, 1.5  # seconds; factor
NAMED_LAYERS = ("removing", "last", "first")


@dataclass(frozen=True)
class Setting:
    """A model with the rows of a task.

    Attributes:
        rows: The rows.
        parts: The model.
        layers: Layer by name: ``removing`` the outlier, ``last``, ``first`` outlier layer.
        states: States that enter the layer trained last, for the next method there.
    """

    rows: TaskRows
    parts: ModelParts
    layers: dict[str, int]
    states: dict[int, PrefixCache] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, task: str, seed: int, data_dir: str) -> "Setting":
        """Load a model and the rows of a task, and profile the layers."""
        sizes: dict[str, Any] = dict(
            zip(("num_train", "num_dev", "num_test"), ROWS.get(task, (1000, 200, 872)), strict=True)
        )
        folder = None if task == "movie_reviews" else data_dir
        rows = TaskRows(task, tokenizer=model, data_dir=folder, **sizes, batch_size=16, seed=seed)
        rows.setup("fit")
        options = ZOModule(model, seed=seed).options
        parts = load_parts(options, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        adapt_rows(rows, parts, options)
        batches = [batch.to(parts.model.device) for batch in rows.profile_batches(16)]
        context = SelectionContext(profile_layers(parts, batches)[0])
        layers = {
            "removing": OutlierRemovingLayer().select(context).layer,
            "last": parts.num_layers - 1,
            "first": FirstOutlierLayer().select(context).layer,
        }
        return cls(rows, parts, layers)


def train(setting: Setting, layer: int, method: str, model_name: str, seed: int, seconds: float) -> dict[str, Any]:
    """Train with each rate of a method, and return the result with the lowest dev loss."""
    estimator, scope, factors = METHODS[method]
    options = ZOModule(model_name, estimator=estimator(), scope=scope(), seed=seed).options
    found = [_train(setting, options, layer, factor, seconds) for factor in factors]
    return min(found, key=lambda result: result["dev_loss"])


def _train(setting: Setting, options: TrainingOptions, layer: int, factor: float, seconds: float) -> dict[str, Any]:
    rows = setting.rows
    parts = setting.parts
    model = tune(parts, options, rows, layer, setting.states.get(layer))
    setting.states.clear()
    setting.states[layer] = model.forward.cache
    before = model.tensors.clone_masters()
    plan_prefix(model, rows)
    fill_prefix(model, rows)
    auto = auto_rate(make_stepper(model, options, rows), rows)
    auto.factor *= factor
    optimizer = options.optimizer.make(model.tensors.masters)
    set_rate(optimizer, 0.0)
    stepper = make_stepper(model, options, rows, auto=auto)
    batches, metric, evaluator = rows.training_batches(None), rows.selection_metric, rows.evaluator(model)
    used, due, step, lowest = 0.0, 0.0, 0, math.inf
    best, curve = before, []
    try:
        while True:
            if used >= min(due, seconds):
                scores = rows.score(evaluator, rows.eval_batches("dev"), keep_prefix=True)
                curve.append((step, round(used, 2), scores["loss"], scores[metric.metric]))
                if scores["loss"] < lowest:
                    lowest, best = scores["loss"], model.tensors.clone_masters()
                if used >= seconds:
                    break
                due = max(FIRST_CHECK, used * GROWTH)
            batch = next(batches).to(parts.model.device)
            started = time.process_time()
            result = stepper.step(batch, step, optimizer)
            used += time.process_time() - started
            step += 1
            if not result.estimate.finite and stepper.num_nonfinite > 3:
                break
        model.tensors.load(best)
        held_out = rows.score(evaluator, rows.eval_batches("test"))
    finally:
        model.tensors.load(before)
        model.release()
    return {
        "layer": layer,
        "steps": step,
        "factor": factor,
        "evaluations": stepper.num_evaluations,
        "dev_loss": lowest,
        "loss": held_out["loss"],
        "score": held_out.get(metric.metric),
        "curve": curve,
    }


def cells(args: argparse.Namespace) -> Iterator[tuple[tuple[str, str, int], str, str]]:
    """Iterate over the cells: model, task and seed; layer; method."""
    for seed, task, model in product(args.seeds, args.tasks, args.models):
        for layer, method in product(args.layers, args.methods):
            yield (model, task, seed), layer, method


def name_of(setting: tuple[str, str, int], layer: str, method: str) -> str:
    """Return the name of a cell."""
    model, task, seed = setting
    return f"{Path(model).stem}-{task}-{layer}-{method}-{seed}"


def report(store: CellStore, args: argparse.Namespace) -> str:
    """Return the table of the finished cells."""
    lines = ["| model | task | layer | seed | method | steps | dev loss | held-out loss | held-out score |"]
    lines.append("|---|---|---|--:|---|--:|--:|--:|--:|")
    for setting, layer, method in cells(args):
        row = store.result(name_of(setting, layer, method))
        if row is None:
            continue
        model, task, seed = setting
        score = "" if row["score"] is None else f"{row['score']:.3f}"
        lines.append(
            f"| {Path(model).stem} | {task} | {layer} ({row['layer']}) | {seed} | {method} | {row['steps']} | "
            f"{row['curve'][0][2]:.3f} -> {row['dev_loss']:.3f} | {row['loss']:.3f} | {score} |"
        )
    return "\n".join(lines)


def main() -> None:
    """Run the missing cells and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m"], help="models, as in model.model")
    parser.add_argument("--tasks", nargs="+", default=["sst2"], help="tasks, as in data.task")
    parser.add_argument("--layers", nargs="+", default=["removing"], help="removing, last, first, or a number")
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--data_dir", required=True, help="folder of the data, as in data.data_dir")
    parser.add_argument("--seconds", type=float, default=60, help="processor time of the steps of each training")
    parser.add_argument("--output", default="methods", help="folder of the results")
    parser.add_argument("--report", action="store_true", help="print the table without training")
    args = parser.parse_args()
    if wrong := [layer for layer in args.layers if layer not in NAMED_LAYERS and not layer.isdigit()]:
        parser.error(f"--layers {wrong[0]}: choose removing, last, first, or a number from 0")
    store = CellStore(args.output, {"seconds": args.seconds, "threads": torch.get_num_threads()})
    setting_of = lru_cache(maxsize=1)(lambda model, task, seed: Setting.of(model, task, seed, args.data_dir))

    def compute(setting: tuple[str, str, int], layer: str, method: str) -> dict[str, Any]:
        model, _, seed = setting
        loaded = setting_of(*setting)
        number = loaded.layers[layer] if layer in loaded.layers else int(layer)
        return train(loaded, number, method, model, seed, args.seconds)

    def say(name: str, result: dict[str, Any]) -> None:
        print(
            f"{name}: layer {result['layer']}, {result['steps']} steps, dev loss {result['dev_loss']:.4f}", flush=True
        )

    if not args.report:
        store.complete({name_of(*cell): partial(compute, *cell) for cell in cells(args)}, say)
    print(report(store, args))


if __name__ == "__main__":
    main()
