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

import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from pathlib import Path
from typing import Any, NamedTuple

import torch

from slzo.experiments.store import CellStore
from slzo.models.parts import ModelParts
from slzo.models.prefix_cache import PrefixCache
from slzo.module import ZOModule
from slzo.task_data import TaskData
from slzo.training.build import auto_rate, make_stepper, tune
from slzo.training.options import TrainingOptions
from slzo.training.prefix_plan import fill_prefix, plan_prefix
from slzo.utils.errors import SlzoError
from slzo.zo.estimators import SPSA, Backprop, Estimator, LayerOutputPerturbation
from slzo.zo.optim import set_rate
from slzo.zo.scopes import ActivationSubspace, LayerScope, Scope
from slzo.zo.selection import FirstOutlierLayer, OutlierRemovingLayer, SelectionRule

sys.path.insert(0, str(Path(__file__).parents[1]))
from loading import chosen_layers, load, task_rows
from options import command, option, parse
from tables import finished, markdown_table

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
RULES: dict[str, type[SelectionRule]] = {"removing": OutlierRemovingLayer, "first": FirstOutlierLayer}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of the command."""

    models: list[str] = option(["smollm2-135m"], "models, as in model.model")
    tasks: list[str] = option(["sst2"], "tasks, as in data.task")
    layers: list[str] = option(["removing"], "removing, last, first, or a number")
    methods: list[str] = option(list(METHODS), "estimator and scope", choices=list(METHODS))
    seeds: list[int] = option([0], "seeds of rows and directions")
    data_dir: str = option(help="folder of the data, as in data.data_dir")
    seconds: float = option(60, "processor time of the steps of each training")
    output: str = option("methods", "folder of the results")
    report: bool = option(False, "print the table without training")


class Cell(NamedTuple):
    """A training; the attributes are as in the options."""

    model: str
    task: str
    seed: int
    layer: str
    method: str


@dataclass(frozen=True)
class Setting:
    """A model with the rows of a task.

    Attributes:
        rows: The rows.
        parts: The model.
        layers: Layer by name: ``last``, and those of the rules that are used.
        states: States that enter the layer trained last, for the next method there.
    """

    rows: TaskData
    parts: ModelParts
    layers: dict[str, int]
    states: dict[int, PrefixCache] = field(default_factory=dict)

    @classmethod
    def of(cls, model: str, task: str, seed: int, data_dir: str, names: Sequence[str]) -> "Setting":
        """Load a model and the rows of a task; profile the layers if names among ``RULES`` are used."""
        data = task_rows(model, task, data_dir, ROWS.get(task, (1000, 200, 854)), seed)
        parts = load(ZOModule(model, seed=seed).options, data)
        layers = {"last": parts.num_layers - 1}
        if rules := [name for name in RULES if name in names]:
            layers |= zip(rules, chosen_layers(parts, data, *(RULES[name]() for name in rules)), strict=True)
        return cls(data, parts, layers)


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
    auto = auto_rate(model, options, rows)
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


def row_of(cell: Cell, result: dict[str, Any]) -> list[object]:
    """Return the row of a finished cell."""
    layer, before = f"{cell.layer} ({result['layer']})", result["curve"][0][2]
    losses = [f"{before:.3f} -> {result['dev_loss']:.3f}", f"{result['loss']:.3f}"]
    score = "" if result["score"] is None else f"{result['score']:.3f}"
    return [Path(cell.model).name, cell.task, layer, cell.seed, cell.method, result["steps"], *losses, score]


@command
def main(argv: Sequence[str] | None = None) -> None:
    """Run the missing cells and print the table."""
    options = parse(Options, __doc__, argv)
    for layer in options.layers:
        if layer not in (*RULES, "last") and not layer.isdecimal():
            raise SlzoError(f"--layers {layer!r}: choose removing, last, first, or a number from 0")
    store = CellStore(options.output, {"seconds": options.seconds, "threads": torch.get_num_threads()})

    @lru_cache(maxsize=1)
    def setting_of(model: str, task: str, seed: int) -> Setting:
        return Setting.of(model, task, seed, options.data_dir, options.layers)

    def compute(cell: Cell) -> dict[str, Any]:
        setting = setting_of(cell.model, cell.task, cell.seed)
        layer = setting.layers[cell.layer] if cell.layer in setting.layers else int(cell.layer)
        return train(setting, layer, cell.method, cell.model, cell.seed, options.seconds)

    every = product(options.seeds, options.tasks, options.models, options.layers, options.methods)
    cells = [Cell(model, task, seed, layer, method) for seed, task, model, layer, method in every]
    head = ["model", "task", "layer", "seed", "method", "steps", "dev loss", "held-out loss", "held-out score"]
    rows = [row_of(*each) for each in finished(store, cells, compute, options.report)]
    print(markdown_table(head, rows, left=5))


if __name__ == "__main__":
    sys.exit(main())
